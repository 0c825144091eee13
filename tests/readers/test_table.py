"""The recorded table is the command's own, complete, and says what is known of the readers."""

from __future__ import annotations

from typing import Any

import pytest
from run_all import FORMS, OUTPUT, markdown

from ctxext.export.reader_environments import READERS
from ctxext.export.readers import NOISE_FLOOR, RIGHT
from ctxext.files import read_json


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    table: dict[str, Any] = read_json(OUTPUT / "table.json")
    return table


def test_every_reader_was_asked_about_every_form(recorded: dict[str, Any]) -> None:
    asked = {(row["reader"], row["form"]) for row in recorded["rows"]}
    assert asked == {(reader, form.name) for reader in READERS for form in FORMS}
    assert len(recorded["rows"]) == len(asked) >= 24


def test_the_verdicts_are_the_known_ones(recorded: dict[str, Any]) -> None:
    known = {(reader, form.name): form.mistakes.get(reader, RIGHT) for reader in READERS for form in FORMS}
    assert {(row["reader"], row["form"]): row["verdict"] for row in recorded["rows"]} == known


def test_right_and_wrong_lie_far_apart(recorded: dict[str, Any]) -> None:
    for row in recorded["rows"]:
        assert row["unscaled_mean"] > 100 * NOISE_FLOOR, row["form"]
        assert (row["mean_difference"] < NOISE_FLOOR / 10) == (row["verdict"] == RIGHT), row
    assert recorded["portable_against_native_yarn"] < 1e-3


def test_the_markdown_is_derived_from_the_json(recorded: dict[str, Any]) -> None:
    assert (OUTPUT / "table.md").read_text(encoding="utf-8") == markdown(recorded, recorded["rows"])
