"""The recorded table is the command's own, complete, and says what is known of the readers."""

from __future__ import annotations

from typing import Any

import pytest
from run_all import FORMS, ORIGINAL_LENGTH, OUTPUT, TARGET_LENGTH, Form, markdown
from transformers import LlamaConfig

from ctxext.export.checkpoint import add_older_form
from ctxext.export.portability import portability
from ctxext.export.reader_environments import READERS
from ctxext.export.readers import NOISE_FLOOR, RIGHT
from ctxext.files import read_json
from ctxext.rope.patchers import extend_config
from ctxext.rope.portable import portable_config


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


def exported_config(form: Form) -> dict[str, Any]:
    """What `config.json` holds for this form, for a model with SmolLM2's positions."""
    base = LlamaConfig(
        head_dim=64,
        max_position_embeddings=ORIGINAL_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    extended = extend_config(base, method=form.method, target_length=TARGET_LENGTH, **form.parameters(base))
    written = portable_config(extended)[0] if form.portable else extended
    return add_older_form(written.to_dict())


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
def test_the_portability_rules_say_what_was_seen(form: Form, recorded: dict[str, Any]) -> None:
    seen = {row["reader"]: row["verdict"] == RIGHT for row in recorded["rows"] if row["form"] == form.name}
    rules = {item.reader: item for item in portability(exported_config(form))}
    num_compared = 0
    for reader, right in seen.items():
        rule = rules[reader]
        # The rule is about llama.cpp's own converter; the readers were given our GGUF, which the rule must then advise.
        promised = rule.verdict == "right" or (reader == "llamacpp" and "ctxext export --gguf" in (rule.instead or ""))
        assert promised == right, (reader, rule)
        num_compared += 1
    assert num_compared == len(READERS)
