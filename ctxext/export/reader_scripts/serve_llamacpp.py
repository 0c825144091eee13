"""llama.cpp's HTTP server on CPU. Runs in that reader's environment, without ctxext, until it is ended."""

import os
import threading

import xllamacpp  # type: ignore[import-not-found]


def serve(model: str, context: int, port: int) -> None:
    """Serve on loopback, exactly: keys and values in float32, no flash attention."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = context
    params.n_parallel = 1
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.warmup = False
    params.fit_params = False
    params.ctx_shift = False
    params.n_gpu_layers = 0
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)  # it serves as long as it is referred to
    print(server.listening_address, flush=True)
    threading.Event().wait()
