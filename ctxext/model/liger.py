"""Liger's fused output embedding and cross entropy (Hsu et al. 2024, arXiv:2410.10989), an optional extra for CUDA.

Its Triton kernels make loss and gradient of a chunk of logits in one pass over them. Only for heads that are one plain
linear layer; whether it computes our loss is asked of the model itself before the first step (`prove_liger`).
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ctxext.errors import ResourceError, UnsupportedModelError, UsageError
from ctxext.model.logits import LogitChange
from ctxext.model.loss import IGNORE_INDEX, DecoderHead, summed_loss
from ctxext.recipe.train import TrainBlock

_KEY = "train.loss"
_TOKENS = 16
# Of the loss, and of its gradient's largest element. Liger rounds its gradients to the dtype of the hidden states.
_TOLERANCES = {torch.float32: 1e-4}
_HALF_PRECISION = 2.0**-5


def check_liger(train: TrainBlock, device_type: str) -> None:
    """Refuse, before any work, a loss that cannot run here.

    Raises:
        ResourceError: not installed, or no device for it.
    """
    if train.loss != "liger":
        return
    missing = [name for name in ("liger_kernel", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise ResourceError(
            f"this needs {' and '.join(missing)}, not installed here",
            where=_KEY,
            got=train.loss,
            hint="Install the extra `liger` (pip install 'ctxext[liger]'), or use train.loss=torch.",
        )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels in Python, for tests
    if device_type not in ("cuda", "xpu") and not interpreted:
        raise ResourceError(
            "Liger's kernels need an accelerator that Triton compiles for",
            where=_KEY,
            got=f"{train.loss} on {device_type}",
            hint="Use train.loss=torch.",
        )


def liger_summed_loss(hidden: Tensor, head: nn.Module, targets: Tensor, change: LogitChange) -> Tensor:
    """What `ctxext.model.loss.summed_loss` is, computed by Liger.

    Raises:
        UsageError: a head that is more than one plain linear layer, or sharded.
    """
    weight: Any = getattr(head, "weight", None)
    if type(head) is not nn.Linear or isinstance(weight, DTensor):
        raise UsageError(
            "Liger computes the loss of a plain linear output embedding only",
            where=_KEY,
            got=type(head).__name__,
            hint="Use train.loss=torch.",
        )
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", softcap=change.soft_cap, accum_dtype=torch.float32
    )
    hidden = hidden.to(weight.dtype)
    scale = change.factor / change.divisor
    if scale != 1.0:  # of the logits, which are linear in the hidden states
        if head.bias is not None:
            raise UsageError("Liger cannot scale the logits of a head with a bias", where=_KEY)
        hidden = hidden * scale
    bias = None if head.bias is None else head.bias[: change.vocab_size]
    result: Tensor = loss(weight[: change.vocab_size], hidden, targets, bias)
    return result


def prove_liger(parts: DecoderHead) -> None:
    """Compare Liger's loss and gradient with ours, at 16 positions of this head.

    Raises:
        UnsupportedModelError: they differ.
    """
    weight = parts.head.weight
    words = weight.shape[0] if parts.change.vocab_size is None else parts.change.vocab_size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    targets = torch.randint(0, words, (_TOKENS,), generator=generator).to(weight.device)
    targets[::5] = IGNORE_INDEX
    found = []
    for summed in (summed_loss, liger_summed_loss):
        leaf = hidden.clone().requires_grad_()
        loss = summed(leaf, parts.head, targets, parts.change)
        (gradient,) = torch.autograd.grad(loss, leaf)
        found.append((loss.detach(), gradient.float()))
    (our_loss, ours), (their_loss, theirs) = found
    tolerance = _TOLERANCES.get(weight.dtype, _HALF_PRECISION)
    of_loss = float((their_loss - our_loss).abs() / our_loss.abs().clamp(min=1.0))
    of_gradient = float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-6))
    if not (of_loss <= tolerance and of_gradient <= tolerance):
        raise UnsupportedModelError(
            "Liger's loss is not the model's",
            where=_KEY,
            got=f"loss {of_loss:.2g} and gradient {of_gradient:.2g} apart, relatively; allowed are {tolerance:.2g}",
            hint="Use train.loss=torch, and please report this.",
        )
