"""What stands on the command line becomes a checked recipe: a shipped name, a file, or a model with a length."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import make_job, save_tiny_model
from transformers import GPT2Config

from ctxext.errors import ArtefactError, RecipeError, UnsupportedModelError, UsageError
from ctxext.pipeline.recipes import is_recipe, recipe_of
from ctxext.recipe.load import shipped_names


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_tiny_model(tmp_path / "model"))


def test_names_files_and_models_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(is_recipe(name) for name in shipped_names("recipes"))
    assert is_recipe("my/own.yaml")
    assert is_recipe("own.yml")
    assert not is_recipe("owner/model")
    assert not is_recipe(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert not is_recipe("quickstart")


def test_a_file_takes_length_method_and_settings_from_the_command_line(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    recipe = recipe_of(str(job.recipe_path), ["train.steps=7"], target_length=512, method="linear")
    assert (recipe.target_length, recipe.rope.method, recipe.train.steps) == (512, "linear", 7)


def test_a_model_takes_defaults(model: str) -> None:
    recipe = recipe_of(model, ["train.steps=7"], target_length=512)
    assert (recipe.model.source, recipe.target_length, recipe.rope.method) == (model, 512, "yarn")
    assert recipe.train.steps == 7
    assert recipe_of(model, [], target_length=512, method="linear").rope.method == "linear"


def test_a_model_needs_a_length(model: str) -> None:
    with pytest.raises(UsageError, match="--target-length"):
        recipe_of(model, [])


def test_a_misspelt_recipe_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'quickstart'"):
        recipe_of("quikstart", [])


def test_problems_of_the_command_line_do_not_blame_the_file(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with pytest.raises(RecipeError) as caught:
        recipe_of(str(job.recipe_path), ["train.steps=0"], target_length=100, method="yran")
    assert len(caught.value.problems) == 3
    starts = ("command line: target_length: ", "command line: rope.method: ", "command line: train.steps: ")
    for start in starts:
        assert any(problem.startswith(start) for problem in caught.value.problems)


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ArtefactError, match=r"\./no/such/model"):
        recipe_of("./no/such/model", [], target_length=512)


def test_a_model_without_rope_is_refused_before_anything_else(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="learned absolute positions"):
        recipe_of(str(tmp_path), ["train.steps=0"], target_length=4096)


def test_a_recorded_baseline_that_does_not_exist_is_reported_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.recorded: unknown recorded baseline; got 'tinny'.*'tiny'"):
        recipe_of("tiny", ["evaluation.recorded=tinny"])
