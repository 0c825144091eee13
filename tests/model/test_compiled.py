"""Compiled layers compute the same losses and gradients, activation checkpoints included."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support import tiny_model

from ctxext.errors import UsageError
from ctxext.model.compiled import compile_layers
from ctxext.model.lora import add_lora
from ctxext.model.savings import Savings, apply_savings, check_savings
from ctxext.recipe.schema import LoraBlock, TrainBlock
from ctxext.train.step import SummedLoss

slow = pytest.mark.skipif(
    not os.environ.get("CTXEXT_TEST_COMPILE"),
    reason="compiles with a C++ compiler for half a minute; CTXEXT_TEST_COMPILE=1 runs it",
)


@slow
@pytest.mark.parametrize("savings", [Savings(), Savings(checkpoint_every=1)], ids=Savings.describe)
def test_losses_and_gradients_are_those_of_plain_layers(savings: Savings) -> None:
    results = []
    for compiled in (False, True):
        model: Any = add_lora(tiny_model(), LoraBlock(rank=4), seed=0).train()
        apply_savings(model, savings)
        assert not compiled or compile_layers(model) == 2
        ids = torch.arange(64)[None]
        loss = SummedLoss(model)(ids, ids)
        loss = loss[0] if isinstance(loss, tuple) else loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (plain, gradients), (other, others) = results
    assert float(other) == pytest.approx(float(plain), rel=1e-5)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_tiles_and_compilation_are_refused_together() -> None:
    train = TrainBlock.model_validate({"compile": True, "memory": {"tile_tokens": 64}})
    with pytest.raises(UsageError, match="tiles"):
        check_savings(train, 512, "cpu")
    check_savings(train.model_copy(update={"compile": False}), 512, "cpu")
    check_savings(TrainBlock(compile=True), 512, "cpu")
