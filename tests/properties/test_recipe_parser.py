"""Whatever stands in a recipe: it loads, or a `CtxextError` says why. Nothing else ever escapes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctxext.errors import CtxextError, exit_code_of
from ctxext.evaluation.suite import Suite
from ctxext.files import shipped_directory
from ctxext.recipe.load import Document, apply_overrides, parse_document, to_yaml, validate_document
from ctxext.recipe.schema import Recipe

SHIPPED = [path.read_text() for path in sorted(shipped_directory("recipes").rglob("*.yaml"))]
SHIPPED += [path.read_text() for path in sorted(shipped_directory("evals").joinpath("suites").glob("*.yaml"))]
DOCUMENTS = [parse_document(text, "r.yaml") for text in SHIPPED]

any_text = st.text(st.characters(blacklist_categories=()), max_size=200)
words_of_yaml = """
    model source rope method yarn target_length data facts train steps evaluation : - ? & * ! !! | > ' " # % @ `
    { } [ ] , \\n \\t \\0 \\x00 \\ud800 ~ null true .nan .inf 1e400 -0 010 --- ... << = %YAML %TAG &a *a
    !!python/name: !!set !!float !!timestamp !!bool !!binary !!int !!omap !!null
    """.split()
glue = ["\n", "\n  ", "\n    ", " ", ": ", "- ", "\ufeff", "\x85", "\u2028", "\U0010ffff", "\ud800", "\0", "9" * 40]
yaml_soup = st.lists(st.sampled_from([*words_of_yaml, *glue]), max_size=60).map("".join)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**60), 10**60),
    st.floats(),
    any_text,
    st.sampled_from(["yarn", "none", "linear", "skip-wise", "text", "auto", "passkey", "quick", "", "1e-4", "no"]),
)
keys = st.sampled_from(
    """
    model source revision dtype rope method factor beta_fast beta_slow attention_factor truncate control target_length
    data sources kind paths weight windows mode length chunks facts share style per_window seed lora rank alpha targets
    train steps warmup evaluation suite before output_dir grid depths samples target original description task
    """.split()
)
structures = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys | any_text, inner, max_size=6),
    max_leaves=25,
)
near_recipes = st.fixed_dictionaries(
    {"model": st.just({"source": "some/model"}), "target_length": st.integers(1, 1 << 20) | structures},
    optional=dict.fromkeys(("rope", "data", "lora", "train", "evaluation", "output_dir"), structures),
)


def read(text: str) -> str:
    """What became of a text: `loaded`, or the message. Anything but a `CtxextError` fails the test."""
    return outcome_of(lambda: parse_document(text, "r.yaml"))


def outcome_of(document: Callable[[], Document]) -> str:
    outcome = "loaded"
    for schema in (Recipe, Suite):
        error: CtxextError | None = None
        try:
            validate_document(document(), schema)
        except CtxextError as caught:
            error = caught
        if error is not None:
            assert exit_code_of(error) == 2
            outcome = str(error)
            assert outcome
    return outcome


@settings(max_examples=300)
@given(any_text)
@example("\ud800")
@example('"\\ud800": 1')
@example("a: !!timestamp x")
@example("a: !!float ''")
@example("a: 1\n" * 3)
@example("{" * 400)
@example("- " * 400)
@example("? " * 400)
@example("%YAML 1." + "9" * 5000)
@example("a: " + "9" * 5000)
@example("a: 1e999999999")
@example("a: '\\U00110000'")
@example('a: "\\U00110000"')
@example("\ufeffmodel: {source: a}\ntarget_length: 5\n")
def test_any_text(text: str) -> None:
    read(text)


@settings(max_examples=300)
@given(yaml_soup)
def test_any_soup_of_yaml(text: str) -> None:
    read(text)


@settings(max_examples=150)
@given(structures | near_recipes)
def test_any_structure(value: Any) -> None:
    read(json.dumps(value, ensure_ascii=False))
    read(json.dumps(value))


@settings(max_examples=60)
@given(near_recipes)
def test_any_structure_in_block_style(value: Any) -> None:
    read(yaml.safe_dump(value, allow_unicode=True))


@settings(max_examples=150)
@given(st.sampled_from(SHIPPED), st.integers(0, 1 << 32), st.integers(1, 4))
def test_shipped_files_with_mistakes(text: str, seed: int, num_mistakes: int) -> None:
    rng = random.Random(seed)
    for _ in range(num_mistakes):
        at = rng.randrange(len(text) + 1)
        mistake = rng.randrange(5)
        if mistake == 0:
            text = text[:at] + text[at + rng.randint(1, 8) :]
        elif mistake == 1:
            text = text[:at] + rng.choice(":-{}[]'\"#&*!|>%@~?,\n\t \0") + text[at:]
        elif mistake == 2:
            lines = text.splitlines(keepends=True)
            rng.shuffle(lines)
            text = "".join(lines)
        elif mistake == 3:
            lines = text.splitlines(keepends=True)
            text = "".join([*lines, rng.choice(lines)] if lines else [])
        else:
            words = text.split(" ")
            words[rng.randrange(len(words))] = rng.choice(["null", "[]", "{}", "-1", "1e400", "no", "'", "9" * 40])
            text = " ".join(words)
    read(text)


@settings(max_examples=300)
@given(
    st.sampled_from(DOCUMENTS),
    any_text | yaml_soup | st.tuples(keys, keys, any_text).map(lambda p: f"{p[0]}.{p[1]}={p[2]}"),
)
def test_any_override(document: Document, override: str) -> None:
    outcome_of(lambda: apply_overrides(document, [override]))


@pytest.mark.parametrize("depth", [30, 31, 32, 33, 90, 900, 90_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}"), ("[{a: ", "}]")])
def test_any_depth(depth: int, opening: str, closing: str) -> None:
    nested = opening * depth + "1" + closing * depth
    read(f"model: {nested}\n")
    outcome_of(lambda: apply_overrides(DOCUMENTS[0], [f"data={nested}"]))
    assert "problem" in read("\n".join(" " * level + "a:" for level in range(min(depth, 900))))


def test_every_shipped_file_is_mutated() -> None:
    assert len(SHIPPED) >= 5


plain_text = st.text(st.characters(blacklist_categories=("Cs", "Cc"), whitelist_characters="\n\t\x85"), max_size=30)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**28), 10**28) | st.floats(allow_nan=False) | plain_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain_text, inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=200)
@given(st.dictionaries(plain_text, plain_values, min_size=1, max_size=4))
def test_written_values_come_back_unchanged(values: dict[str, Any]) -> None:
    again = parse_document(to_yaml(values), "r.yaml").values
    assert again == values
    assert repr(again) == repr(values)
