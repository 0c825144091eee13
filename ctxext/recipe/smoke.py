"""A recipe made tiny: every stage that it has, over the whole range of positions, in seconds."""

from __future__ import annotations

from typing import Any

from ctxext.recipe.data import DataBlock
from ctxext.recipe.schema import Recipe
from ctxext.recipe.train import TrainBlock

STEPS = 2
_WINDOW_TOKENS = 128
# A window with facts has to hold one of them and the question about it.
_FACTS_WINDOW_TOKENS = 256
_TILE_TOKENS = 64
DESCRIPTION = "SMOKE TEST: two steps, made to see that everything runs; its numbers mean nothing"


def smoke_recipe(recipe: Recipe, *, suite: str, output_dir: str, num_processes: int = 1) -> Recipe:
    """The recipe with two steps of short windows whose positions reach up to the target length.

    Model, method, data sources, what is trained, the savings that the real windows would get, arms and stages stay.
    Evaluation during training is left out: its prompts lie beyond the original length.

    Args:
        suite: path of a tiny suite.
        num_processes: that share a step of two windows each, so that gradients are accumulated.
    """
    values = _smoke_blocks(recipe.data, recipe.train, recipe.target_length, num_processes)
    stages = None
    if recipe.stages is not None:
        # A stage's own keys stand above the recipe's, so the smoke test's stand above both.
        stages = [
            stage.model_dump(mode="json", exclude_unset=True)
            | _smoke_blocks(stage.data or recipe.data, stage.train or recipe.train, stage.target_length, num_processes)
            for stage in recipe.stages
        ]
    evaluation = recipe.evaluation.model_dump(mode="json") | {"suite": suite, "recorded": None, "gates": None}
    model = recipe.model.model_dump(mode="json") | {"description": DESCRIPTION}
    whole = recipe.model_dump(mode="json") | values | {"stages": stages}
    return Recipe.model_validate(whole | {"model": model, "evaluation": evaluation, "output_dir": output_dir})


def _smoke_blocks(data: DataBlock, train: TrainBlock, target_length: int, num_processes: int) -> dict[str, Any]:
    window_tokens = data.windows.length or target_length
    return {"data": _smoke_data(data, window_tokens), "train": _smoke_train(train, window_tokens, num_processes)}


def _smoke_data(data: DataBlock, window_tokens: int) -> dict[str, Any]:
    values = data.model_dump(mode="json")
    length = min(window_tokens, _WINDOW_TOKENS if data.facts is None else _FACTS_WINDOW_TOKENS)
    values["windows"] |= {"length": length}
    if data.windows.mode == "full-length" and data.windows.positions != "random-shift":
        values["windows"] |= {"mode": "skip-wise", "positions": "consecutive"}
    values["length"] |= {"allow_short": True}
    if data.facts is not None:
        values["facts"] |= {"per_window": 1}
    return values


def _smoke_train(train: TrainBlock, window_tokens: int, num_processes: int) -> dict[str, Any]:
    memory = train.memory.model_dump(mode="json")
    tiled = train.memory.tile(window_tokens * train.windows_per_device) is not None
    return train.model_dump(mode="json") | {
        "steps": STEPS,
        "windows_per_step": 2 * num_processes,
        "windows_per_device": 1,
        "checkpoint_every": 1,
        "keep_checkpoints": STEPS,
        "max_hours": None,
        "evaluate": None,
        # What others see, or keep, is not for tests.
        "trackers": [name for name in train.trackers if name == "tensorboard"],
        "activation_checkpointing": train.uses_activation_checkpointing(window_tokens),
        "memory": memory | {"tile_tokens": _TILE_TOKENS if tiled else "off"},
    }
