"""Liger's loss is ours where it runs, and refused before any work where it does not.

Its kernels run here in Triton's interpreter, on a CPU and slowly, where `liger-kernel` and `triton` are installed (the
development environment has neither) and the interpreter is on from the start:

    TRITON_INTERPRET=1 python -m pytest tests/model/test_liger.py
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import SilentReporter, make_job, step_lines, tiny_model

from ctxext.errors import ResourceError, UnsupportedModelError, UsageError
from ctxext.model import liger
from ctxext.model.liger import check_liger, liger_summed_loss, prove_liger
from ctxext.model.logits import UNCHANGED, LogitChange
from ctxext.model.loss import IGNORE_INDEX, DecoderHead, summed_loss
from ctxext.pipeline.extend import extend
from ctxext.planning.plan import make_plan
from ctxext.recipe.schema import TrainBlock

installed = all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))
needs_liger = pytest.mark.skipif(
    not installed or os.environ.get("TRITON_INTERPRET") != "1", reason="needs liger-kernel, triton, TRITON_INTERPRET=1"
)


def test_it_is_refused_before_any_work_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "liger" in name else real(name))
    make_plan(job.recipe())
    with pytest.raises(ResourceError, match=r"train\.loss: this needs liger_kernel.*ctxext\[liger\]"):
        make_plan(job.recipe("train.loss=liger"))


def test_it_is_refused_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    train = TrainBlock(loss="liger")
    check_liger(train, "cuda")
    check_liger(train, "cpu")  # in the interpreter
    monkeypatch.delenv("TRITON_INTERPRET")
    check_liger(TrainBlock(), "cpu")
    with pytest.raises(ResourceError, match=r"train\.loss: .*accelerator.*liger on cpu"):
        check_liger(train, "cpu")


def test_a_head_that_is_more_than_a_linear_layer_is_refused() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["lm_head"]))
    head = DecoderHead(model.get_base_model()).head
    with pytest.raises(UsageError, match=r"train\.loss: .*plain linear"):
        liger_summed_loss(torch.zeros(3, 32), head, torch.zeros(3, dtype=torch.long), UNCHANGED)


def test_the_proof_finds_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = DecoderHead(tiny_model())
    monkeypatch.setattr(liger, "liger_summed_loss", summed_loss)
    prove_liger(parts)
    monkeypatch.setattr(liger, "liger_summed_loss", lambda *given: summed_loss(*given) * 1.001)
    with pytest.raises(UnsupportedModelError, match="Liger's loss is not"):
        prove_liger(parts)


@needs_liger
@pytest.mark.parametrize("change", [UNCHANGED, LogitChange(divisor=8.0), LogitChange(factor=0.25, vocab_size=90)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_value_and_gradients_are_ours(change: LogitChange, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(24, 101, bias=False, dtype=dtype)
    hidden, targets = torch.randn(37, 24, dtype=dtype) * 3, torch.randint(0, 90, (37,))
    targets[::5] = IGNORE_INDEX
    found = []
    for summed in (summed_loss, liger_summed_loss):
        leaf = hidden.clone().requires_grad_()
        head.zero_grad()
        loss = summed(leaf, head, targets, change)
        (loss * 0.25).backward()
        found.append((loss.detach(), leaf.grad, head.weight.grad))
    assert found[1][0].dtype == torch.float32
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        assert float((theirs - ours).abs().max()) <= tolerance * max(float(ours.abs().max()), 1.0)


@needs_liger
def test_a_training_with_it_has_the_losses_of_one_without(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    lines: list[list[dict[str, Any]]] = []
    for name in ("torch", "liger"):
        folder = tmp_path / name
        settings = (f"train.loss={name}", f"output_dir={folder}", "train.steps=2")
        extend(job.recipe(*settings), SilentReporter(), last_stage="train")
        lines.append(step_lines(folder))
    for ours, theirs in zip(*lines, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
