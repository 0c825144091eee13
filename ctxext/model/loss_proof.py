"""Does the loss without logits see what the model's own class computes? Asked of the model itself, on a few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ctxext.errors import UnsupportedModelError, first_line
from ctxext.model.loss import DecoderHead
from ctxext.model.placement import input_device

_TOKENS = 16
# Largest difference of log-probabilities, as a share of the largest one. Classes soft-cap in their own precision, we in
# float32, so half precision differs by a few of its steps of 2**-8; the smallest known change, a soft cap of 30 on
# logits around 3, is 2e-3 of them.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_PRECISION = 2.0**-5


def prove_loss(model: nn.Module) -> bool:
    """Compare the losses of every word at 16 positions with those from the model's own logits.

    Two short forward passes in eval mode. What cannot be asked is left alone: what is no transformers model,
    weights that are sharded over processes or not there yet, and broken weights, whose logits are no numbers anyway.

    Returns:
        Whether it could be asked.

    Raises:
        UnsupportedModelError: they differ, so that training and perplexity would silently be wrong.
    """
    if not isinstance(model, PreTrainedModel) or any(p.is_meta or isinstance(p, DTensor) for p in model.parameters()):
        return False
    parts = DecoderHead(model)
    embeddings: Any = model.get_input_embeddings()
    ids = (torch.arange(_TOKENS, device=input_device(model))[None] * 7919 + 11) % embeddings.weight.shape[0]
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad(), _eval_mode(model):
        theirs = model(**arguments).logits.float()
        try:
            ours = parts.logits(parts.hidden_states(**arguments)).to(theirs.device)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise _unsupported(model, f"it cannot be computed at all ({first_line(error)})") from error
    if not bool(theirs.isfinite().all() or ours.isfinite().all()):
        return False  # broken weights give no numbers either way; whatever measures or trains them says so
    tolerance = _TOLERANCES.get(model.dtype, _HALF_PRECISION)
    if ours.shape != theirs.shape:
        raise _unsupported(model, f"logits of {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
    difference = _relative_difference(ours, theirs)
    if not difference <= tolerance:  # not a number is no proof either
        raise _unsupported(
            model, f"losses {difference:.2g} apart, relative to the largest; allowed are {tolerance:.2g}"
        )
    return True


def _relative_difference(ours: Tensor, theirs: Tensor) -> float:
    mine, reference = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float((mine - reference).abs().max() / reference.abs().max().clamp(min=1.0))


def _unsupported(model: PreTrainedModel, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the loss from hidden states and output embedding is not the one of the model's own logits",
        where=type(model).__name__,
        got=got,
        hint="Please report this model: what its class does to its logits has to be added to ctxext/model/logits.py.",
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
