"""Log-probabilities of a prompt's last tokens from llama.cpp. Runs in that reader's environment, without ctxext.

The server gives no log-probabilities of prompt tokens, but those of a generated one, taken before any sampler. So the
prompt grows one id at a time over a cached prefix, and a bias makes the server generate the id that really follows.

Keys and values are held in float32 and flash attention is off: with the defaults, rounding alone is worth 0.02 to 0.05
on average, as much as a small attention factor; like this it is worth 2e-5.
"""

import json
import os

import xllamacpp  # type: ignore[import-not-found]

_CERTAIN = 1e4


def log_probs(model_path: str, ids: list[int], num_scored: int) -> list[float]:
    """Natural logarithms of what the model gives the last `num_scored` ids, each after all ids before it."""
    params = xllamacpp.CommonParams()
    params.model.path = model_path
    params.n_ctx = len(ids) + 1
    params.n_parallel = 1
    params.warmup = False
    params.fit_params = False
    params.ctx_shift = False
    params.n_gpu_layers = 0
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    values = []
    for place in range(len(ids) - num_scored, len(ids)):
        request = {
            "prompt": ids[:place],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
            "cache_prompt": True,
            "logit_bias": [[ids[place], _CERTAIN]],
        }
        answer = server.handle_completions(request)
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp did not answer: {json.dumps(answer)[:300]}")
        (generated,) = answer["choices"][0]["logprobs"]["content"]
        if generated["id"] != ids[place] or answer["usage"]["prompt_tokens"] != place:
            raise RuntimeError(f"llama.cpp answered for another prompt or token at {place}")
        values.append(float(generated["logprob"]))
    return values
