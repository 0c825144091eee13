"""What bitsandbytes saves is in the traced memory, and is what a real step on the CPU takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from planning.test_memory import LORA, TOKENS, llama_8b, window
from support import needs_bitsandbytes, save_tiny_model, tiny_config
from torch import nn

from ctxext.model.adaptation import adapt
from ctxext.model.load import resolve_source
from ctxext.model.quantised import load_quantised
from ctxext.model.savings import Savings, apply_savings
from ctxext.planning.allocator import peak_growth_bytes
from ctxext.planning.memory import Sharding, StepMemory, StepShape, trace_step
from ctxext.planning.quantised import TracedLinear4bit, moments_in_8_bits
from ctxext.planning.trace import Ledger
from ctxext.recipe.schema import LoraBlock, TrainBlock
from ctxext.train.optimizer import make_optimizer
from ctxext.train.step import SummedLoss, run_step

SHAPE = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024}


def num_bytes(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def measured(folder: Path, savings: Savings) -> int:
    base = load_quantised(
        resolve_source(str(folder)), tiny_config(**SHAPE), dtype=torch.float32, device=torch.device("cpu")
    )
    model: Any = adapt(base, "qlora", LORA, seed=0).train()
    apply_savings(model, savings)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    optimizer = make_optimizer(model, TrainBlock())
    loss, optimizer = accelerator.prepare(SummedLoss(model), optimizer)
    run_step(accelerator, loss, optimizer, [window(16)], 1, 1.0)
    held = [*model.parameters(), *model.buffers()]
    held += [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            held += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    step = peak_growth_bytes(
        lambda: run_step(accelerator, loss, optimizer, [window(TOKENS)], 1, 1.0), torch.device("cpu")
    )
    return num_bytes(held) + step


def traced(savings: Savings, adaptation: Any) -> StepMemory:
    shape = StepShape(windows=1, window_tokens=TOKENS, dtype=torch.float32, device="cpu")
    return trace_step(tiny_config(**SHAPE), LORA, savings, shape, SummedLoss, adaptation=adaptation)


@needs_bitsandbytes
@pytest.mark.parametrize("savings", [Savings(), Savings(checkpoint_every=1, tile_tokens=128)], ids=Savings.describe)
def test_traced_and_measured_peaks_agree_with_a_base_in_4_bits(savings: Savings, tmp_path: Path) -> None:
    memory = traced(savings, "qlora")
    assert sum(memory.split.values()) == memory.peak_bytes
    assert memory.peak_bytes == pytest.approx(measured(save_tiny_model(tmp_path / "m", **SHAPE), savings), rel=0.02)


@needs_bitsandbytes
def test_a_layer_allocates_what_bitsandbytes_and_peft_allocate_for_it() -> None:
    from bitsandbytes.nn import Linear4bit

    plain = nn.Linear(256, 1024, bias=False)
    real = Linear4bit(256, 1024, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    real.load_state_dict(plain.state_dict())
    peaks = []
    for layer, device in ((real.to("cpu"), "cpu"), (TracedLinear4bit(plain), "meta")):
        model = get_peft_model(nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"]))
        x = torch.zeros(4096, 256, device=device, requires_grad=True)
        with Ledger() as ledger:
            with ledger.phase("forward"):
                y = model(x)
            with ledger.phase("backward"):
                y.sum().backward()
        peaks.append([ledger.peak([phase]).num_bytes for phase in ("forward", "backward")])
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_the_split_names_4_bit_weights_and_their_scales() -> None:
    plain, quantised = traced(Savings(1), "lora"), traced(Savings(1), "qlora")
    linear = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
    assert quantised.split["4-bit weights"] == linear // 2
    # A byte for 64 weights, four bytes for 256 of those, and per layer two tables and an offset.
    scales = linear // 64 + 4 * linear // 64 // 256 + 4 * 7 * 4 * (16 + 256 + 1)
    assert quantised.split["scales of 4-bit weights"] == pytest.approx(scales, rel=0.001)
    assert plain.split["weights"] - quantised.split["weights"] == 4 * linear
    assert "4-bit weights" not in plain.split


def test_layers_of_an_8b_model_take_0_52_bytes_a_parameter() -> None:
    shape = StepShape(windows=1, window_tokens=1024, dtype=torch.bfloat16)
    config = llama_8b()
    config.num_hidden_layers = 2
    held = []
    for adaptation in ("lora", "qlora"):
        memory = trace_step(config, LORA, Savings(checkpoint_every=1), shape, SummedLoss, adaptation=adaptation)
        held.append(sum(size for kind, size in memory.split.items() if "weights" in kind))
    linear = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    assert held[0] - held[1] == pytest.approx(linear * (2 - 0.5 - 1 / 64 - 1 / 4096), rel=1e-4)


def test_sharding_divides_the_4_bit_weights_and_not_their_scales() -> None:
    shape = StepShape(windows=1, window_tokens=TOKENS, dtype=torch.float32, device="cpu")
    one, four = (
        trace_step(
            tiny_config(**SHAPE), LORA, Savings(1), shape, SummedLoss, Sharding(weights=count), adaptation="qlora"
        )
        for count in (1, 4)
    )
    assert four.split["4-bit weights"] == -(-one.split["4-bit weights"] // 4)
    assert four.split["scales of 4-bit weights"] == one.split["scales of 4-bit weights"]
    plain = trace_step(tiny_config(**SHAPE), LORA, Savings(1), shape, SummedLoss, Sharding(weights=4))
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024  # gathered as it lies in memory; two at a time
    saved = plain.split["gathered layers"] - four.split["gathered layers"]
    assert saved == 2 * (4 * layer - layer // 2)


def test_moments_in_8_bits_are_traced_as_such() -> None:
    shape = StepShape(windows=1, window_tokens=TOKENS, dtype=torch.float32, device="cpu")
    wide = LoraBlock(rank=64)
    plain, small = (
        trace_step(tiny_config(**SHAPE), wide, Savings(1), shape, SummedLoss, moment_bytes=size) for size in (4, 1)
    )
    assert small.split["optimizer"] == pytest.approx(plain.split["optimizer"] / 4, rel=0.05)


@needs_bitsandbytes
def test_traced_moments_are_those_of_the_optimizer() -> None:
    layer = nn.Linear(100, 120)  # a bias of 120 elements, whose moments stay in float32
    optimizer = make_optimizer(layer, TrainBlock(optimizer="adamw-8bit"))
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in layer.parameters():
        state = optimizer.state[parameter]
        real = [state[key] for key in ("state1", "state2", "absmax1", "absmax2") if key in state]
        assert num_bytes(real) == sum(t.numel() * t.element_size() for t in moments_in_8_bits(parameter))
