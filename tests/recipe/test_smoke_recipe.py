"""The tiny version of a recipe has all its stages and its whole range of positions, and nothing that takes long."""

from __future__ import annotations

from typing import Any

import pytest

from ctxext.evaluation.smoke import smoke_suite
from ctxext.evaluation.suite import Suite, load_suite, resolve_samples
from ctxext.files import shipped_directory
from ctxext.recipe.load import read_document, validate_document
from ctxext.recipe.schema import Recipe
from ctxext.recipe.smoke import smoke_recipe

SHIPPED = sorted(path for path in shipped_directory("recipes").glob("*.yaml"))
SUITES = sorted(path.stem for path in shipped_directory("evals").glob("suites/*.yaml"))


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({"model": {"source": "m"}, "target_length": 65536, **changes})


def tiny(asked: Recipe, num_processes: int = 1) -> Recipe:
    return smoke_recipe(asked, suite="s.yaml", output_dir="out", num_processes=num_processes)


def test_model_method_sources_arms_and_savings_stay_and_everything_long_goes() -> None:
    asked = recipe(
        rope={"method": "linear"},
        data={"sources": [{"kind": "generated-words"}], "facts": {"share": 0.3, "per_window": 4}},
        lora={"rank": 5},
        train={"trackers": ["tensorboard", "wandb"], "max_hours": 3.0, "evaluate": {"every": 5}, "seed": 7},
        evaluation={"control": True, "untrained": True, "gates": {"tail": -0.1}, "recorded": "tiny"},
    )
    small = tiny(asked, num_processes=4)
    assert (small.rope, small.lora, small.target_length) == (asked.rope, asked.lora, asked.target_length)
    assert small.data.sources == asked.data.sources
    windows = small.data.windows
    assert (windows.mode, windows.length) == ("skip-wise", 256)
    assert small.data.facts is not None
    assert (small.data.facts.share, small.data.facts.per_window) == (0.3, 1)
    train = small.train
    assert (train.steps, train.windows_per_step, train.windows_per_device, train.seed) == (2, 8, 1, 7)
    assert (train.max_hours, train.evaluate, train.trackers) == (None, None, ["tensorboard"])
    # 65,536 tokens would be checkpointed and tiled, so the short windows are.
    assert train.activation_checkpointing is True
    assert train.memory.tile(256) == 64
    evaluation = small.evaluation
    assert (evaluation.control, evaluation.untrained, evaluation.before) == (True, True, True)
    assert (evaluation.gates, evaluation.recorded, evaluation.suite, small.output_dir) == (None, None, "s.yaml", "out")
    assert "SMOKE TEST" in str(small.model.description)


def test_short_windows_are_not_checkpointed_or_tiled_when_the_real_ones_are_not() -> None:
    small = tiny(recipe(data={"windows": {"mode": "skip-wise", "length": 96, "chunks": 3}}))
    assert (small.data.windows.length, small.data.windows.chunks) == (96, 3)
    assert small.train.activation_checkpointing is False
    assert small.train.memory.tile(96) is None


def test_windows_at_random_starts_stay_what_they_are() -> None:
    small = tiny(recipe(data={"windows": {"positions": "random-shift", "length": 4096}}))
    assert (small.data.windows.mode, small.data.windows.positions, small.data.windows.length) == (
        "full-length",
        "random-shift",
        128,
    )


def test_every_stage_of_a_curriculum_is_made_tiny_and_keeps_what_is_its_own() -> None:
    asked = recipe(
        stages=[{"target_length": 32768, "train": {"steps": 900, "seed": 3}}, {"target_length": 65536}],
        train={"steps": 500, "learning_rate": 0.001},
    )
    small = tiny(asked)
    assert small.stages is not None
    assert [stage.target_length for stage in small.stages] == [32768, 65536]
    first, second = (stage.train for stage in small.stages)
    assert first is not None
    assert second is not None
    assert (first.steps, first.seed, second.steps, second.learning_rate) == (2, 3, 2, 0.001)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_tiny_version(path: Any) -> None:
    asked = validate_document(read_document(path), Recipe)
    small = tiny(asked)
    assert small.train.steps * small.train.windows_per_step * (small.data.windows.length or 0) <= 1024
    assert smoke_recipe(small, suite="s.yaml", output_dir="out") == small


@pytest.mark.parametrize("name", SUITES)
def test_every_shipped_suite_has_a_tiny_version_that_asks_each_task_once(name: str) -> None:
    suite = load_suite(name)
    small = smoke_suite(suite)
    assert isinstance(small, Suite)
    samples = resolve_samples(small, 8192, 65536)
    assert sorted(sample.cell.task for sample in samples) == sorted(task.cell_name for task in suite.members)
    assert all(sample.cell.length_tokens <= 512 for sample in samples)
    assert small.haystack == suite.haystack
    assert all(text.documents == 1 and text.length == 128 for text in small.perplexity or ())
