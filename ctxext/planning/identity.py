"""What makes two runs the same: the values that decide results, as they take effect, and their hash."""

from __future__ import annotations

from typing import Any

from ctxext.evaluation.suite import Suite
from ctxext.recipe.data import STREAMED
from ctxext.recipe.effects import WINDOWS_BALANCED, decisive, flat
from ctxext.recipe.schema import Recipe


def decisive_values(
    recipe: Recipe,
    suite: Suite,
    during: Suite | None,
    *,
    window_tokens: int,
    weights: str,
    start: str | None,
    positions: dict[str, Any],
    auxiliary_loss: bool,
) -> dict[str, Any]:
    """Everything that changes results, by key; see `recipe.effects`.

    Args:
        suite: what the training text must not hold, when it is asked to exclude that.
        during: evaluated while training; chooses the checkpoint, so what is in it decides, not its name.
        weights: fingerprint of the base weights.
        start: hash of the adapter that training starts from, which decides by what it holds and not where it lies.
        positions: RoPE parameters of the extended config.
        auxiliary_loss: whether routers are trained to be balanced, over the windows of one pass.
    """
    values = flat(recipe.model_dump(mode="json"))
    memory, train = recipe.train.memory, recipe.train
    values["train.memory.tile_tokens"] = memory.tile(window_tokens * train.windows_per_device)
    decided = decisive(values)
    if auxiliary_loss:
        decided[WINDOWS_BALANCED] = decided.pop("train.windows_per_device")
    if during is not None:
        decided["train.evaluate.suite"] = during.model_dump(mode="json")
    if start is not None:
        decided["lora.start_from"] = start
    if recipe.data.cache == STREAMED:
        decided["data.cache"] = STREAMED
    if recipe.data.contamination == "exclude":
        decided["left-out-documents"] = suite.model_dump(mode="json")
    else:
        decided["data.contamination"] = "report"  # to refuse changes nothing for whoever is not refused
    return {**decided, "base-weights": weights, "rope-parameters": positions}
