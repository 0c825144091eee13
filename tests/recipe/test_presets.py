"""Data presets become sources of a recipe; every shipped one is of the right form, cited, and says what differs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console

from ctxext.data.presets import presets_view
from ctxext.errors import RecipeError
from ctxext.recipe.data import DataBlock, SourceBlock
from ctxext.recipe.load import parse_document, to_yaml, validate_document
from ctxext.recipe.presets import load_preset, preset_names
from ctxext.recipe.schema import Recipe

BASE = "model: {source: a/b}\ntarget_length: 4096\n"


def recipe(text: str) -> Recipe:
    return validate_document(parse_document(BASE + text, "r.yaml"), Recipe)


def test_the_presets_of_the_literature_are_there() -> None:
    assert {"prolong", "pg19", "longmino"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_cited_and_gives_shares_of_hub_datasets(name: str) -> None:
    mixture = load_preset(name)
    assert any(re.search(r"arXiv:\d{4}\.\d{5}", cite) for cite in mixture.cites)
    assert sum(ingredient.source.weight for ingredient in mixture.ingredients) == pytest.approx(1)
    for ingredient in mixture.ingredients:
        assert ingredient.source.kind == "dataset"
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", ingredient.source.name or "")
    assert mixture.needs_hub


def test_the_share_of_long_text_is_that_of_the_literature() -> None:
    weights = {part.what: part.source.weight for part in load_preset("prolong").ingredients}
    assert weights["code repositories"] == weights["books"] == 0.3


@pytest.mark.parametrize("name", preset_names())
def test_a_recipe_with_a_preset_has_its_sources_and_survives_being_written(name: str) -> None:
    made = recipe(f"data: {{preset: {name}}}\n")
    assert made.data.sources == [ingredient.source for ingredient in load_preset(name).ingredients]
    assert made.data.preset == name
    text = to_yaml(made.model_dump(mode="json"))
    assert validate_document(parse_document(text, "again.yaml"), Recipe) == made
    assert Recipe.model_validate_json(made.model_dump_json()) == made


def test_the_same_from_python() -> None:
    assert [source.name for source in DataBlock(preset="pg19").sources] == ["emozilla/pg19"]
    assert DataBlock().sources == [SourceBlock(kind="python-stdlib")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {preset: prolog}",
            r"r\.yaml:3: data\.preset: unknown data preset; got 'prolog'.* Did you mean 'prolong'",
        ),
        (
            "data:\n  preset: pg19\n  sources: [{kind: python-stdlib}]",
            r"r\.yaml:3: data: preset: pg19 names the sources; leave out preset or sources",
        ),
        ("data:\n  preset: pg19\n  sources: [{kind: nothing}]", r"names the sources|data\.sources"),
        ("data: {preset: 3}", r"r\.yaml:3: data\.preset: "),
        ("data: {preset: no/such.yaml}", r"r\.yaml:3: data\.preset: no/such\.yaml: data preset file not found"),
    ],
)
def test_wrong_presets_are_refused_on_their_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(text + "\n")


def test_a_mixture_of_ones_own_is_a_file_of_the_same_form(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    form = (
        "title: mine\ncites: [me]\ningredients:\n  - {what: books, source: {kind: text, paths: [a.txt], weight: %s}}\n"
    )
    path.write_text(form % 1)
    assert recipe(f"data: {{preset: {path}}}\n").data.sources == [SourceBlock(kind="text", paths=["a.txt"])]
    path.write_text(form % 0.5)
    with pytest.raises(RecipeError, match=r"add up to 1, not 0\.5"):
        recipe(f"data: {{preset: {path}}}\n")


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_list_shows_every_share_and_that_the_hub_is_needed(width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), force_terminal=False)  # noqa: SIM115
    console.print(presets_view())
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= width
    assert all(name in shown for name in preset_names())
    assert shown.count("Needs the Hugging Face hub.") == len(preset_names())
    assert " 30%  books: emozilla/pg19" in " ".join(shown.split("\n"))
