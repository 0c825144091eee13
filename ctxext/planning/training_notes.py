"""What a plan says about a recipe's optimisation before it runs."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig

from ctxext.model.norm_order import is_post_norm
from ctxext.recipe.train import TrainBlock, num_warmup_steps

_POST_NORM_WARMUP = 0.1


def training_notes(config: PreTrainedConfig, train: TrainBlock) -> Iterator[str]:
    """Advice, one line each."""
    if train.warmup < _POST_NORM_WARMUP and is_post_norm(config):
        num_steps = num_warmup_steps(train.steps, train.warmup)
        yield (
            "this model is post-norm: its norms stand behind attention and MLP. Such models bear a fast rising "
            "learning rate badly (Xiong et al. 2020, arXiv:2002.04745); "
            f"train.warmup={_POST_NORM_WARMUP:g} or more is advised, here it is {train.warmup:g} ({num_steps} steps)"
        )
