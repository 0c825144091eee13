"""What only a GPU shows: traced and measured peaks, offloading, the attention kernel, the same losses as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support import SilentReporter, make_job
from transformers import AutoModelForCausalLM, LlamaConfig

from ctxext.data.packing import PackedWindow
from ctxext.model.lora import add_lora
from ctxext.model.savings import Savings, apply_savings
from ctxext.pipeline.extend import extend
from ctxext.planning.memory import StepShape, trace_step
from ctxext.recipe.schema import LoraBlock, TrainBlock
from ctxext.train.metrics import read_metrics
from ctxext.train.optimizer import make_optimizer
from ctxext.train.step import SummedLoss, run_step

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none")
DEVICES = [pytest.param("cuda", marks=needs_cuda), "cpu"]
TOKENS = {"cuda": 16_384, "cpu": 256}
SAVINGS = [
    Savings(),
    Savings(checkpoint_every=1),
    Savings(checkpoint_every=1, tile_tokens=2048),
    Savings(checkpoint_every=1, offload=True, tile_tokens=2048),
]


def config_for(device: str) -> LlamaConfig:
    """A quarter of a billion parameters on a GPU; a dwarf on the CPU, which walks the same way."""
    wide = device == "cuda"
    return LlamaConfig(
        vocab_size=32_000 if wide else 300,
        hidden_size=1024 if wide else 64,
        intermediate_size=4096 if wide else 128,
        num_hidden_layers=8 if wide else 2,
        num_attention_heads=16 if wide else 4,
        num_key_value_heads=4 if wide else 2,
        max_position_embeddings=32_768,
    )


def one_step(device: str, savings: Savings) -> tuple[float, int]:
    """Loss of the second step, and its peak."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_config(config_for(device), dtype=dtype, attn_implementation="sdpa").to(device)
    model: Any = add_lora(base, LoraBlock(), seed=0).train()
    apply_savings(model, savings)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if device == "cuda" else "no")
    loss, optimizer = accelerator.prepare(SummedLoss(model), make_optimizer(model, TrainBlock()))
    tokens = TOKENS[device]
    rows = [PackedWindow([token % 97 for token in range(n)], list(range(n)), [0], 0) for n in (64, tokens)]
    run_step(accelerator, loss, optimizer, rows[:1], 1, 1.0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = run_step(accelerator, loss, optimizer, rows[1:], 1, 1.0)
    return result.loss, torch.cuda.max_memory_allocated() if device == "cuda" else 0


@pytest.mark.parametrize("device", DEVICES)
def test_savings_change_memory_and_not_the_loss(device: str) -> None:
    possible = [savings for savings in SAVINGS if device == "cuda" or not savings.offload]
    losses, peaks = zip(*(one_step(device, savings) for savings in possible), strict=True)
    assert max(losses) - min(losses) < (2e-2 if device == "cuda" else 1e-5)
    if device == "cuda":
        assert list(peaks) == sorted(peaks, reverse=True)


@needs_cuda
@pytest.mark.parametrize("savings", SAVINGS, ids=Savings.describe)
def test_traced_and_measured_peaks_agree_on_the_gpu(savings: Savings) -> None:
    _, measured = one_step("cuda", savings)
    shape = StepShape(1, TOKENS["cuda"], torch.bfloat16, "cuda")
    traced = trace_step(config_for("cuda"), LoraBlock(), savings, shape, SummedLoss)
    assert traced.peak_bytes == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_proves_its_attention_kernel_and_probes_its_memory(device: str, tmp_path: Path) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("a run uses the GPU where there is one")
    job, reporter = make_job(tmp_path), SilentReporter()
    extend(job.recipe(), reporter, last_stage="train")
    (start,) = reporter.starts
    assert any("attention" in kernel for kernel in start.kernels)
    assert start.probe is not None
    assert start.probe.measured_bytes
    assert (start.probe.traced_bytes is not None) == (device == "cuda")
    steps, _ = read_metrics(job.output)
    assert len(steps) == 4
