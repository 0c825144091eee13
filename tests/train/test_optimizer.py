"""The optimizer: what is decayed, which kernel computes it, and moments in 8 bits that resume to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SilentReporter, make_job, needs_bitsandbytes, tiny_config
from torch import nn

from ctxext.errors import ResourceError
from ctxext.model.quantised import check_bitsandbytes
from ctxext.pipeline.extend import extend
from ctxext.planning.plan import make_plan
from ctxext.recipe.train import TrainBlock
from ctxext.train.checkpoint import optimizer_tensors, set_optimizer_tensors
from ctxext.train.optimizer import make_optimizer


class Parts(nn.Module):
    """A matrix of 80 x 64 = 5,120 elements, a small one, a bias and a norm's weight."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.large, self.small, self.norm = nn.Linear(64, 80), nn.Linear(4, 4, bias=False), nn.LayerNorm(4, bias=False)


def advance(optimizer: torch.optim.Optimizer, model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def without_gradients(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


OPTIMIZERS = ["adamw", pytest.param("adamw-8bit", marks=needs_bitsandbytes)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_are_decayed_and_vectors_are_not(name: Any) -> None:
    model = Parts()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    without_gradients(make_optimizer(model, TrainBlock(weight_decay=0.5, learning_rate=0.1, optimizer=name)), model)
    for key, value in model.named_parameters():
        expected = before[key] * (1 - 0.1 * 0.5) if value.ndim == 2 else before[key]
        assert torch.allclose(value, expected, rtol=1e-6), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vectors_alone_are_not_decayed_either(name: Any) -> None:
    model = nn.LayerNorm(8)
    without_gradients(make_optimizer(model, TrainBlock(weight_decay=0.5, learning_rate=0.1, optimizer=name)), model)
    assert torch.equal(model.weight, torch.ones(8))


def test_the_cpu_runs_torchs_default_update_to_the_bit() -> None:
    ours, theirs = Parts(), Parts()
    mine = make_optimizer(ours, TrainBlock(learning_rate=0.01))
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for seed in range(5):
        advance(mine, ours, seed)
        advance(other, theirs, seed)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_only_what_trains_is_optimised() -> None:
    model = Parts()
    model.large.requires_grad_(False)
    optimizer = make_optimizer(model, TrainBlock())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


@needs_bitsandbytes
def test_moments_of_matrices_take_8_bits_and_small_tensors_32() -> None:
    model = Parts()
    optimizer = make_optimizer(model, TrainBlock(optimizer="adamw-8bit"))
    advance(optimizer, model, 0)
    state = optimizer.state
    assert state[model.large.weight]["state1"].dtype == torch.uint8
    assert state[model.large.weight]["state2"].dtype == torch.uint8
    assert state[model.small.weight]["state1"].dtype == torch.float32


@needs_bitsandbytes
def test_moments_in_8_bits_are_stored_and_go_on_to_the_bit(tmp_path: Path) -> None:
    settings = TrainBlock(optimizer="adamw-8bit", learning_rate=0.01, weight_decay=0.1)
    one = Parts()
    first = make_optimizer(one, settings)
    for seed in (1, 2, 3):
        advance(first, one, seed)
    two = Parts(seed=9)
    two.load_state_dict(one.state_dict())
    second = make_optimizer(two, settings)
    stored = optimizer_tensors(first)
    save_file(stored, tmp_path / "optimizer.safetensors")
    set_optimizer_tensors(second, load_file(tmp_path / "optimizer.safetensors"))
    again = optimizer_tensors(second)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], stored[key]) and again[key].dtype == stored[key].dtype for key in stored)
    for seed in (4, 5):
        advance(first, one, seed)
        advance(second, two, seed)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@needs_bitsandbytes
def test_a_run_with_moments_in_8_bits_resumes_to_the_bit(tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(metrics: Any) -> None:
        if metrics.step == 3:
            raise StoppedError

    settings = ["train.optimizer=adamw-8bit", "lora.rank=64", "train.weight_decay=0.1"]
    whole, parts = make_job(tmp_path / "whole"), make_job(tmp_path / "parts")
    extend(whole.recipe(*settings), SilentReporter(), last_stage="train")
    with pytest.raises(StoppedError):
        extend(parts.recipe(*settings), SilentReporter(on_step=stop), last_stage="train")
    extend(parts.recipe(*settings), SilentReporter(), last_stage="train")
    name = "adapter_model.safetensors"
    one, two = (load_file(job.output / "adapter" / name) for job in (whole, parts))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    moments = load_file(whole.output / "checkpoints" / "step-000004" / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in moments.values())


def test_moments_in_8_bits_are_refused_before_any_work_without_bitsandbytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_job(tmp_path).recipe("train.optimizer=adamw-8bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"train\.optimizer.*not installed.*ctxext\[qlora\].*=adamw"):
        make_plan(recipe)


def test_moments_in_8_bits_are_refused_on_apples_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_job(tmp_path).recipe("train.optimizer=adamw-8bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ResourceError, match="Apple"):
        check_bitsandbytes(recipe, tiny_config(), "mps")
    check_bitsandbytes(recipe, tiny_config(), "cuda")
