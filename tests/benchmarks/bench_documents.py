"""A training pass over a window of isolated documents: by lengths, and with the mask of all tokens by all tokens.

    python tests/benchmarks/bench_documents.py [--tokens 4096] [--document 512] [--layers 2]

Random weights in the shape of SmolLM2-135M's decoder, forward and backward, float32 on the CPU; the smallest of three
times, and the most that the allocator had handed out.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ctxext.files import format_bytes
from ctxext.model.documents import DOCUMENTS
from ctxext.planning.allocator import peak_growth_bytes


def decoder(layers: int, attention: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).get_decoder()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--document", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    positions = torch.arange(options.tokens)[None] % options.document
    ids = torch.arange(options.tokens)[None] % 1024
    states = []
    for attention in ("sdpa", DOCUMENTS):
        model = decoder(options.layers, attention)

        def step(model: Any = model) -> torch.Tensor:
            hidden = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            hidden.square().mean().backward()
            return hidden.detach()

        states.append(step())
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        peak = peak_growth_bytes(step, torch.device("cpu"))
        print(f"{attention}: {min(seconds):.2f} s, {format_bytes(peak)}", flush=True)
    print(f"largest difference of the hidden states: {(states[0] - states[1]).abs().max():.1e}")


if __name__ == "__main__":
    main()
