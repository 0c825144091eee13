"""Log-probabilities of a prompt's last tokens from vLLM on CPU. Runs in that reader's environment, without ctxext."""

import json
import math
import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, so that a timeout ends all of it
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else it takes whole cores for itself
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def cache_gib(model_path: str, num_tokens: int) -> int:
    """Whole GiB that vLLM must set aside for the keys and values of the prompt in float32."""
    config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    heads = int(text["num_attention_heads"])
    width = int(text.get("num_key_value_heads") or heads) * int(text.get("head_dim") or text["hidden_size"] // heads)
    return math.ceil(2 * int(text["num_hidden_layers"]) * width * 4 * num_tokens * 1.25 / 2**30)


def log_probs(model_path: str, ids: list[int], num_scored: int) -> list[float]:
    """Natural logarithms of what the model gives the last `num_scored` ids, each after all ids before it."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(cache_gib(model_path, len(ids) + 1))
    from vllm import LLM, SamplingParams

    model = LLM(
        model=model_path,
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(ids) + 1,
        max_num_batched_tokens=len(ids) + 1,
        max_num_seqs=1,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (output,) = model.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    table = output.prompt_logprobs
    return [float(table[place][ids[place]].logprob) for place in range(len(ids) - num_scored, len(ids))]
