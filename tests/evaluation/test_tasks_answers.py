"""Answerers whose score is known: an oracle, a blind one, one off by a digit, a babbler, one that lists everything."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from made_tokenizers import made_tokenizer
from test_tasks_prompts import ALL, CELLS, builder, sample

from ctxext.evaluation.prompt import Prompt
from ctxext.evaluation.scoring import degenerate_kind, score_all

NUM_SAMPLES = 4
LENGTH = 3000
Answerer = Callable[[Prompt], str]


def off_by_one_digit(prompt: Prompt) -> str:
    """Every last digit of a number in the answers is one more; words lose their last letter."""

    def wrong(answer: str) -> str:
        last = answer[-1]
        return answer[:-1] + (str((int(last) + 1) % 10) if last.isdigit() else "")

    return ", ".join(map(wrong, prompt.answers))


ANSWERERS: dict[str, Answerer] = {
    "oracle": lambda prompt: " " + ", ".join(prompt.answers) + ".",
    "shouting oracle": lambda prompt: "It is " + " and ".join(prompt.answers).upper(),
    "blind": lambda prompt: " I do not know.",
    "off by one digit": off_by_one_digit,
    "babbling": lambda prompt: " the text of the text" * 8,
    "appends a digit": lambda prompt: ", ".join(f"{answer}0" for answer in prompt.answers),
}


def mean_scores(name: str, answerer: Answerer) -> dict[str, float]:
    made, total = builder("byte-level BPE"), dict[str, float]()
    for index in range(NUM_SAMPLES):
        prompt = made.build(sample(name, LENGTH, 0.37, index))
        for metric, score in score_all(
            answerer(prompt), prompt.answers, prompt.distractors, metric=prompt.metric
        ).items():
            total[metric] = total.get(metric, 0.0) + score / NUM_SAMPLES
    return total


@pytest.mark.parametrize("name", CELLS)
def test_known_answerers_get_the_scores_they_must_get(name: str) -> None:
    for answerer in ("oracle", "shouting oracle"):
        assert set(mean_scores(name, ANSWERERS[answerer]).values()) == {1.0}, answerer
    for answerer in ("blind", "off by one digit", "babbling"):
        assert set(mean_scores(name, ANSWERERS[answerer]).values()) == {0.0}, answerer


@pytest.mark.parametrize("name", CELLS)
def test_rulers_substring_is_fooled_by_a_longer_number_and_ours_is_not(name: str) -> None:
    for metric, score in mean_scores(name, ANSWERERS["appends a digit"]).items():
        assert score == (1.0 if metric.startswith("string_match") else 0.0), metric


@pytest.mark.parametrize("name", ["niah_multikey_1", "cwe", "fwe", "chains", "no_overlap"])
def test_listing_everything_satisfies_ruler_and_not_the_first_candidates(name: str) -> None:
    scores = mean_scores(name, lambda prompt: ", ".join(sorted((*prompt.answers, *prompt.distractors))))
    assert scores["string_match_all/1"] == scores["whole_match_all/1"] == 1.0
    assert scores["first_match_all/1"] <= 0.75


def test_without_a_needle_no_reader_of_the_text_is_right() -> None:
    made, tokenizer = builder("byte-level BPE"), made_tokenizer("byte-level BPE")
    for index in range(20):
        prompt = made.build(sample("no_needle", LENGTH, 0.5, index))
        everything = " ".join(re.findall(r"\d+", tokenizer.decode(prompt.input_ids)))
        assert set(score_all(everything, prompt.answers, metric=prompt.metric).values()) == {0.0}


def test_the_deciding_metric_comes_first_and_rulers_stands_beside_it() -> None:
    made = builder("byte-level BPE")
    for task in ALL.members:
        prompt = made.build(sample(task.cell_name, LENGTH))
        names = list(score_all("x", prompt.answers, prompt.distractors, metric=prompt.metric))
        assert names[0] == f"{prompt.metric}/1"
        assert any(name.startswith("string_match") for name in names)
        assert any(name.startswith(("number_match", "whole_match")) for name in names)


def test_babbling_is_degenerate_and_an_answer_is_not() -> None:
    assert degenerate_kind("the text the text", [5, 6] * 8) == "repeating"
    assert degenerate_kind("1234567 and 7654321", list(range(16))) is None
