"""vLLM's HTTP server on CPU. Runs in that reader's environment, without ctxext, until ended."""

import os
import runpy
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, so that its end is the end
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else it takes whole cores for itself
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def serve(model: str, context: int, port: int) -> None:
    """Serve on loopback in float32."""
    options = {
        "model": model,
        "host": "127.0.0.1",
        "port": str(port),
        "dtype": "float32",
        "max-model-len": str(context),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    sys.argv = ["vllm", *words, "--enforce-eager", "--max-num-seqs", "4"]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
