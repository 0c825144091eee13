"""Time and peak memory of one prefill: windowed attention against transformers' `sdpa`, same model, same run.

    python tests/benchmarks/bench_windowed.py [--length 8192] [--window 512] [--threads 1]

The model is random and has Gemma 3 270M's attention (4 query heads and 1 key head of 256, one full layer in six), with
narrow other layers and a small vocabulary, so that attention is what is timed. Every measurement has a process of its
own: peak memory is the process's. Seconds are CPU seconds, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from ctxext.model.windowed import WINDOWED

CHUNK = 1024  # tokens a step of a chunked prefill, as in an evaluation


def prefill(attention: str, length: int, window: int, chunked: bool) -> dict[str, float | list[float]]:
    """CPU seconds and growth of the peak memory of a prefill of `length` tokens."""
    config = Gemma3TextConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=length,
        sliding_window=window,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval().get_decoder()
    ids = torch.randint(0, 256, (1, length))
    with torch.no_grad():
        model(input_ids=ids[:, :CHUNK], use_cache=False)
        before, started = peak_bytes(), time.process_time()
        if chunked:
            cache = DynamicCache(config=config)
            for piece in ids.split(CHUNK, dim=1):
                hidden = model(input_ids=piece, past_key_values=cache).last_hidden_state
        else:
            hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    return {
        "seconds": time.process_time() - started,
        "peak_bytes": peak_bytes() - before,
        "last": hidden[0, -1].double().tolist(),
    }


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure, or with `--one` be one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("ATTENTION", "WAY"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.one:
        attention, way = asked.one
        print(json.dumps(prefill(attention, asked.length, asked.window, way == "chunked")))
        return
    print(f"{asked.length} tokens, window {asked.window}, {asked.threads} thread(s), torch {torch.__version__}")
    for way in ("one pass", "chunked"):
        found = {}
        for attention in ("sdpa", WINDOWED):
            command = [sys.executable, *sys.argv, "--one", attention, way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[attention] = json.loads(done.stdout)
            seconds, peak = found[attention]["seconds"], found[attention]["peak_bytes"]
            print(f"{way:9} {attention:15} {seconds:7.1f} s  {peak / 2**20:7.0f} MiB")
        stock, windowed = found["sdpa"], found[WINDOWED]
        difference = max(abs(a - b) for a, b in zip(stock["last"], windowed["last"], strict=True))
        print(
            f"{way:9} {stock['seconds'] / windowed['seconds']:.1f} times faster, "
            f"{stock['peak_bytes'] / max(windowed['peak_bytes'], 1):.1f} times less memory, "
            f"largest difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
