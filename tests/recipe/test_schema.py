"""Contradictions inside a recipe are refused, on the line of the block that holds them; what fits together is not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ctxext.errors import RecipeError
from ctxext.recipe.data import DataBlock, WindowsBlock
from ctxext.recipe.load import parse_document, to_yaml, validate_document
from ctxext.recipe.schema import Recipe, TrainBlock
from ctxext.rope.methods import NoRewrite, Yarn

MINIMAL = "model: {source: some/model}\ntarget_length: 4096\n"

CONTRADICTIONS: dict[str, tuple[str, str]] = {
    "length without skip-wise": ("data: {windows: {length: 512}}", "r.yaml:3: data.windows: full-length windows span"),
    "chunks without skip-wise": ("data: {windows: {chunks: 4}}", "r.yaml:3: data.windows: full-length windows have no"),
    "skip-wise without length": (
        "data: {windows: {mode: skip-wise}}",
        "r.yaml:3: data.windows: skip-wise windows need",
    ),
    "more chunks than tokens": (
        "data: {windows: {mode: skip-wise, length: 3, chunks: 4}}",
        "r.yaml:3: data.windows: a window of 3 tokens cannot have 4 chunks",
    ),
    "window above target": (
        "data: {windows: {mode: skip-wise, length: 8192}}",
        "r.yaml:1: recipe: data.windows.length (8192) exceeds target_length (4096)",
    ),
    "text without paths": ("data: {sources: [{kind: text}]}", "r.yaml:3: data.sources.0: kind: text needs paths"),
    "paths without text": (
        "data: {sources: [{kind: python-stdlib, paths: [a]}]}",
        "r.yaml:3: data.sources.0: kind: python-stdlib takes no paths",
    ),
    "no sources": ("data: {sources: []}", "r.yaml:3: data.sources: "),
    "two pass keys": (
        "data: {facts: {share: 1.0, style: passkey, per_window: 2}}",
        "r.yaml:3: data.facts: a question for the pass key has one answer",
    ),
    "no rewrite without control": ("rope: {method: none}", "r.yaml:3: rope.control: missing"),
    "no rewrite with control off": ("rope: {method: none, control: false}", "r.yaml:3: rope.control: "),
    "control arm of a control arm": (
        "rope: {method: none, control: true}\nevaluation: {control: true}",
        "r.yaml:1: recipe: evaluation.control asks for a control arm",
    ),
    "untrained control arm": (
        "rope: {method: none, control: true}\nevaluation: {untrained: true}",
        "r.yaml:1: recipe: evaluation.untrained",
    ),
    "factor below one": ("rope: {method: yarn, factor: 0.5}", "r.yaml:3: rope.factor: "),
    "betas out of order": ("rope: {method: yarn, beta_fast: 1, beta_slow: 2}", "r.yaml:3: rope: beta_fast (1) must"),
    "share above one": ("data: {facts: {share: 1.1}}", "r.yaml:3: data.facts.share: "),
    "warmup for ever": ("train: {warmup: 0.5}", "r.yaml:3: train.warmup: "),
    "endless learning rate": ("train: {learning_rate: .inf}", "r.yaml:3: train.learning_rate: "),
    "seed out of range": ("train: {seed: 4294967296}", "r.yaml:3: train.seed: "),
}


@pytest.mark.parametrize(("block", "start"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions_are_refused_on_their_line(block: str, start: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validate_document(parse_document(f"{MINIMAL}{block}\n", "r.yaml"), Recipe)
    (problem,) = caught.value.problems
    assert problem.startswith(start)


NOT_STRICT: dict[str, str] = {
    "text for a number": "train: {steps: '5'}",
    "number for text": "model: {source: 5}",
    "fraction for a count": "train: {steps: 5.0}",
    "number for a switch": "evaluation: {before: 1}",
    "word for a switch": "evaluation: {before: yes}",
    "one for a list": "lora: {targets: q_proj}",
    "null for a number": "train: {steps: null}",
}


@pytest.mark.parametrize("block", NOT_STRICT.values(), ids=NOT_STRICT.keys())
def test_values_are_never_converted(block: str) -> None:
    text = block if block.startswith("model") else f"model: {{source: some/model}}\n{block}"
    with pytest.raises(RecipeError) as caught:
        validate_document(parse_document(f"target_length: 4096\n{text}\n", "r.yaml"), Recipe)
    assert len(caught.value.problems) == 1


def test_a_whole_number_is_good_enough_where_a_fraction_may_stand() -> None:
    recipe = validate_document(
        parse_document(MINIMAL + "lora: {alpha: 32}\nrope: {method: yarn, factor: 2}\n", "r"), Recipe
    )
    assert recipe.lora.alpha == 32.0
    assert recipe.rope.factor == 2.0


def test_defaults_are_valid_and_say_yarn() -> None:
    recipe = validate_document(parse_document(MINIMAL, "r.yaml"), Recipe)
    assert recipe.rope == Yarn()
    assert recipe.data == DataBlock()
    assert recipe.data.windows == WindowsBlock(mode="full-length")
    assert recipe.data.facts is None


def test_the_control_arm_is_allowed_when_asked_for() -> None:
    recipe = validate_document(parse_document(MINIMAL + "rope: {method: none, control: true}\n", "r.yaml"), Recipe)
    assert recipe.rope == NoRewrite(control=True)


def test_a_recipe_cannot_be_changed_after_it_was_checked() -> None:
    recipe = validate_document(parse_document(MINIMAL, "r.yaml"), Recipe)
    for block in (recipe, recipe.train, recipe.model, recipe.rope):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(block, next(iter(type(block).model_fields)), None)


@pytest.mark.parametrize(
    ("setting", "window_tokens", "expected"),
    [("auto", 4096, False), ("auto", 4097, True), (True, 8, True), (False, 1 << 20, False)],
)
def test_automatic_checkpointing_depends_on_the_window(setting: Any, window_tokens: int, expected: bool) -> None:
    assert TrainBlock(activation_checkpointing=setting).uses_activation_checkpointing(window_tokens) is expected


ANY_RECIPE: list[str] = [
    "",
    "rope: {method: linear}",
    "rope: {method: ntk}",
    "rope: {method: theta, theta: 1e6}",
    "rope: {method: theta, multiple: 3}",
    "rope: {method: llama3, high_freq_factor: 8}",
    "rope: {method: yarn, attention_factor: 1.1, truncate: false}",
    "rope: {method: none, control: true}",
    "data: {windows: {mode: skip-wise, length: 64, chunks: 3}, facts: {share: 0.5, per_window: 2}}",
    "data: {windows: {mode: full-length}, facts: {share: 1, style: passkey}}",
    "data: {sources: [{kind: text, paths: [a, 'b/*.txt'], weight: 1e-3}]}",
    "lora: {targets: [q_proj], alpha: 1e16}",
    "train: {learning_rate: 5e-5, activation_checkpointing: false, trackers: []}",
]


@pytest.mark.parametrize("block", ANY_RECIPE)
def test_a_recipe_with_every_default_written_out_is_the_same_recipe(block: str) -> None:
    recipe = validate_document(parse_document(f"{MINIMAL}{block}\n", "r.yaml"), Recipe)
    text = to_yaml(recipe.model_dump(mode="json"))
    assert validate_document(parse_document(text, "again.yaml"), Recipe) == recipe
