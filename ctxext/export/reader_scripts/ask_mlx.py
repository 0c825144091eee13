"""Log-probabilities of a prompt's last tokens from mlx-lm. Runs in that reader's environment, without ctxext.

The prompt goes through the cache as in mlx-lm's own generation; MLX is lazy, so the head of the prompt never meets
the output matrix, which is most of the work of a small model on a CPU.
"""

from pathlib import Path

import mlx.core as mx  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache  # type: ignore[import-not-found]
from mlx_lm.utils import load_model  # type: ignore[import-not-found]

_PREFILL_TOKENS = 2048


def log_probs(model_path: str, ids: list[int], num_scored: int) -> list[float]:
    """Natural logarithms of what the model gives the last `num_scored` ids, each after all ids before it."""
    model, _ = load_model(Path(model_path))
    model.set_dtype(mx.float32)
    cache = make_prompt_cache(model)
    head, tail = ids[: -num_scored - 1], ids[-num_scored - 1 : -1]
    for start in range(0, len(head), _PREFILL_TOKENS):
        model(mx.array([head[start : start + _PREFILL_TOKENS]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    logits = model(mx.array([tail]), cache=cache)[0].astype(mx.float32)
    table = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return [float(table[row, token]) for row, token in enumerate(ids[-num_scored:])]
