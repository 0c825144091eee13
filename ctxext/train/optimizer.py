"""The optimizer of a recipe."""

from __future__ import annotations

import torch
from torch import nn

from ctxext.recipe.train import TrainBlock

BETAS = (0.9, 0.95)


def make_optimizer(model: nn.Module, train: TrainBlock) -> torch.optim.Optimizer:
    """AdamW over what `model` trains; betas (0.9, 0.95) as in YaRN's training."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=train.learning_rate, betas=BETAS, weight_decay=train.weight_decay)
