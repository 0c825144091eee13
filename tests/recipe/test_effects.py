"""Every key of a recipe is classified by what it changes; what decides is compared key by key and shown as a table."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from ctxext.recipe import effects
from ctxext.recipe.base import Block
from ctxext.recipe.data import SourceBlock
from ctxext.recipe.effects import LATER, Difference, decisive, differences, effect_of, flat, table
from ctxext.recipe.schema import Recipe

# A method's parameters are the method: they count as one key. A stage is made of blocks that stand here themselves.
WHOLE = ("rope", "stages")


def blocks_in(annotation: Any) -> list[type[Block]]:
    """Blocks that a field's type names, also in lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return [annotation]
    if get_origin(annotation) in (Annotated, list, Union, types.UnionType):
        return [block for argument in get_args(annotation) for block in blocks_in(argument)]
    return []


def keys_of(block: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key that has no keys below it."""
    for name, info in block.model_fields.items():
        inner = [] if f"{prefix}{name}" in WHOLE else blocks_in(info.annotation)
        if not inner:
            yield f"{prefix}{name}"
        for deeper in inner:
            yield from keys_of(deeper, f"{prefix}{name}.")


KEYS = list(keys_of(Recipe))


def test_the_walk_reaches_blocks_in_blocks_lists_and_options() -> None:
    assert {"data.sources.kind", "data.facts.share", "train.memory.offload", "evaluation.gates.by", "rope"} <= {*KEYS}
    assert len(KEYS) > 80


def test_the_table_and_the_schema_have_the_same_keys() -> None:
    """A new key is added to `ctxext/recipe/effects.py` with what it changes (and to `LATER`)."""
    classified = set(effects._EFFECTS) - set(effects._BESIDES)
    assert classified == set(KEYS)
    assert all(effect_of(key) != "none" for key in LATER)


def test_a_key_stands_in_the_table_once() -> None:
    names = [
        f"{block}.{key}" if block else key
        for block, by_effect in effects._TABLE.items()
        for keys in by_effect.values()
        for key in keys.split()
    ]
    assert len(names) == len(set(names))


def test_an_unknown_key_has_no_effect_that_could_be_guessed() -> None:
    with pytest.raises(KeyError):
        effect_of("train.unheard_of")


@pytest.mark.parametrize(
    ("key", "effect"),
    [
        ("train.trackers", "none"),
        ("train.max_hours", "none"),
        ("train.attention", "last-bits"),
        ("train.learning_rate", "results"),
        ("target_length", "fixed"),
        ("rope.beta_fast", "fixed"),
        ("data.facts", "results"),
        ("train.evaluate", "results"),
        ("evaluation.gates.tail", "none"),
    ],
)
def test_parameters_take_the_effect_of_their_block_and_blocks_the_strongest_of_their_keys(
    key: str, effect: str
) -> None:
    assert effect_of(key) == effect


def recipe(**changes: Any) -> dict[str, Any]:
    return flat(
        Recipe.model_validate({"model": {"source": "m"}, "target_length": 64, **changes}).model_dump(mode="json")
    )


def test_keys_that_came_later_say_nothing_as_long_as_they_are_as_before() -> None:
    decided = decisive(recipe())
    assert not decided.keys() & {key for key in LATER if key != "train.memory.tile_tokens"}
    assert decisive(recipe(train={"decay": "inverse-sqrt"})).keys() - decided.keys() == {"train.decay"}


def test_keys_without_effect_decide_nothing_those_of_a_source_included() -> None:
    source = {"kind": "python-stdlib"}
    assert decisive(recipe()) == decisive(
        recipe(
            output_dir="x",
            data={"sources": [source | {"max_bad_rows": 9, "streaming": False}], "length": {"allow_short": True}},
            train={"trackers": [], "max_hours": 3.0, "checkpoint_every": 7, "non_finite": "skip"},
            evaluation={"suite": "other", "control": True},
        )
    )
    (decided,) = decisive(recipe())["data.sources"]
    assert decided.keys() == SourceBlock.model_fields.keys() - {"max_bad_rows", "streaming"}


def test_differences_begin_with_the_gravest_and_know_what_is_missing() -> None:
    stored = decisive(recipe(data={"facts": {"share": 0.5}}))
    asked = decisive(recipe(target_length=128, train={"attention": "sdpa"}))
    found = differences(stored, asked)
    assert [(d.key, d.stored, d.new, d.effect) for d in found] == [
        ("target_length", 64, 128, "fixed"),
        ("data.facts.per_window", 1, None, "results"),
        ("data.facts.share", 0.5, None, "results"),
        ("data.facts.style", "records", None, "results"),
        ("train.attention", "auto", "sdpa", "last-bits"),
    ]
    assert differences(stored, stored) == []


def test_the_table_has_equal_columns_and_cuts_long_values() -> None:
    lines = table(
        [Difference("train.seed", 0, 1, "results"), Difference("data.sources", ["x" * 99], None, "last-bits")]
    ).splitlines()
    assert lines[0].split() == ["setting", "stored", "now", "effect"]
    assert [line.index(word) for line, word in zip(lines[1:], ("changes", "changes"), strict=True)] == [
        lines[0].index("effect")
    ] * 2
    assert max(map(len, lines)) < 100
    assert re.search(r"x\.\.\.  - +changes the last bits only$", lines[2])
