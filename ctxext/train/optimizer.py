"""The optimizer of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ctxext.errors import ResourceError, UsageError
from ctxext.recipe.train import TrainBlock

BETAS = (0.9, 0.95)


def make_optimizer(model: nn.Module, train: TrainBlock) -> torch.optim.Optimizer:
    """AdamW over what `model` trains; betas (0.9, 0.95) as in YaRN's training.

    Weight decay is for matrices. What has one dimension (norms, biases, DoRA's magnitudes) is never decayed: it scales
    or shifts, so that a pull towards zero would change what the layer computes rather than keep it small.

    On CUDA the update is one fused kernel. Elsewhere it is torch's default, whose last bits differ from fused ones.

    Raises:
        ResourceError: `adamw-8bit` where bitsandbytes cannot compute it.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = _groups(trained, train.weight_decay)
    if train.optimizer == "adamw-8bit":
        return _adamw_8bit(groups, trained, train)
    fused = bool(trained) and all(parameter.device.type == "cuda" for parameter in trained)
    return torch.optim.AdamW(
        groups, lr=train.learning_rate, betas=BETAS, weight_decay=train.weight_decay, fused=fused or None
    )


def _groups(trained: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    if not weight_decay or not vectors or not matrices:
        decayed = weight_decay if matrices else 0.0
        return [{"params": trained, "weight_decay": decayed}]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _adamw_8bit(groups: list[dict[str, Any]], trained: list[nn.Parameter], train: TrainBlock) -> torch.optim.Optimizer:
    """AdamW whose moments are stored in 8 bits, in blocks of 256 (Dettmers et al. 2021, arXiv:2110.02861).

    Tensors of fewer than 4,096 elements keep float32 moments, as bitsandbytes does by default.
    """
    if any(isinstance(parameter, DTensor) for parameter in trained):
        raise UsageError(
            "moments in 8 bits cannot be sharded over processes",
            where="train.optimizer",
            got="adamw-8bit",
            hint="Use adamw, whose moments FSDP2 divides by the number of processes.",
        )
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ResourceError(
            f"bitsandbytes cannot be imported ({error})",
            where="train.optimizer",
            got="adamw-8bit",
            hint="Install the extra `qlora`, or use train.optimizer=adamw.",
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(
        groups, lr=train.learning_rate, betas=BETAS, weight_decay=train.weight_decay
    )
    return optimizer
