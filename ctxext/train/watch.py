"""Which monitors watch a training."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from ctxext.recipe.schema import Recipe
from ctxext.train.monitors import Monitor


def make_monitors(recipe: Recipe, config: PreTrainedConfig, device: torch.device) -> list[Monitor]:
    """The monitors that a recipe asks for, new ones for every arm.

    Args:
        config: the extended config, which says what can be watched in this model.
    """
    return []
