"""Controls: kinds of degenerate answers as they are stored, and what repeated noise means for independence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import byte_tokenizer, tiny_model

from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.clusters import cluster_of, is_noise
from ctxext.evaluation.engine import evaluate_samples
from ctxext.evaluation.prompt import suite_builder
from ctxext.evaluation.scoring import degenerate_kind
from ctxext.evaluation.store import SampleResult, SampleStore, load_samples
from ctxext.evaluation.suite import Suite, resolve_samples
from ctxext.evaluation.tail import TailNumber, tail_number

TEMPLATE = "{% for message in messages %}<user>{{ message.content }}</user>{% endfor %}"


def results_of(folder: Path, length: int = 400, **changes: Any) -> list[SampleResult]:
    rows = [{"length": length, "depths": [0.0, 0.5, 1.0], "samples": 2}]
    values = {"description": "t", "wording": "passkey", "haystack": "generated-words", "grid": rows}
    suite = Suite.model_validate({**values, "max_new_tokens": 6, "measure_loss": False, **changes})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    answerer = Answerer(tiny_model(initializer_range=0.2), tokenizer)
    store = SampleStore(folder, {}, {})
    evaluate_samples(answerer, suite_builder(suite, tokenizer), suite, resolve_samples(suite, 1024, 1024), store)
    return load_samples(folder)


def test_an_answer_that_is_cut_off_is_endless_unless_it_is_something_worse() -> None:
    assert degenerate_kind("the key is 12345", [1, 2, 3, 4]) is None
    assert degenerate_kind("the key is 12345", [1, 2, 3, 4], cut_off=True) == "endless"
    assert degenerate_kind("...", [1, 2, 3, 4], cut_off=True) == "empty"
    assert degenerate_kind("a a a a a a a a", [7] * 8, cut_off=True) == "repeating"


def test_only_chat_answers_are_expected_to_stop(tmp_path: Path) -> None:
    plain = results_of(tmp_path / "plain")
    chat = results_of(tmp_path / "chat", apply_chat_template=True)
    cut_off = [result for result in chat if len(result.answer_ids) == 6]
    assert cut_off, f"covered {len(chat)} answers"  # a model without training does not stop
    assert {result.degenerate for result in cut_off} <= {"endless", "empty"}
    assert "endless" in {result.degenerate for result in cut_off}
    assert "endless" not in {result.degenerate for result in plain}


@pytest.mark.parametrize("haystacks", ["own", "paired"])
def test_in_repeated_noise_a_needle_is_the_cluster(tmp_path: Path, haystacks: str) -> None:
    noise = results_of(tmp_path / "noise", 900, haystack="noise", haystacks=haystacks)
    text = results_of(tmp_path / "text", 900, haystacks=haystacks)
    assert all(is_noise(result) for result in noise)
    assert not any(is_noise(result) for result in text)
    num_independent = 6 if haystacks == "own" else 2
    for results in (noise, text):
        assert len({cluster_of(result) for result in results}) == num_independent
    tail = tail_number(noise)
    assert isinstance(tail, TailNumber)
    assert (tail.num_pairs, tail.num_haystacks) == ((0, 0) if haystacks == "own" else (2, 2))
