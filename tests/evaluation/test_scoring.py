"""Scores: whole numbers only, and what counts as babbling."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxext.evaluation.scoring import (
    METRICS,
    degenerate_kind,
    final_answer,
    first_match_all,
    number_match,
    score_all,
    string_match_all,
    string_match_part,
    whole_match_all,
    whole_match_part,
)

EXPECTED = "1234567"


@pytest.mark.parametrize(
    "answer",
    [
        "1234567",
        " 1234567.",
        "1234567, of course",
        "It is '1234567'",
        "(1234567)",
        "7654321 or 1234567",
        "number1234567!",
        "1234567\n\nWhat is",
        "12345678 no, 1234567",
    ],
)
def test_the_whole_number_is_found_whatever_surrounds_it(answer: str) -> None:
    assert number_match(answer, EXPECTED) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "12345678",
        "01234567",
        "912345670",
        "1 234 567",
        "123 4567",
        "1,234,567",
        "1234 567",
        "123456",
        "7654321",
        "1234567\uff18",
        "",
        "the number",
    ],
)
def test_longer_shorter_or_split_numbers_do_not_count(answer: str) -> None:
    assert number_match(answer, EXPECTED) == 0.0


@given(st.from_regex(r"[1-9][0-9]{6}", fullmatch=True), st.text(alphabet=" .,;:\n'\"abcXYZ()-", max_size=20))
def test_a_number_between_any_words_scores_1(value: str, around: str) -> None:
    assert number_match(f"{around}{value}{around}", value) == 1.0


@given(st.from_regex(r"[1-9][0-9]{6}", fullmatch=True), st.from_regex(r"[0-9]{1,3}", fullmatch=True))
def test_a_number_inside_a_longer_one_scores_0(value: str, digits: str) -> None:
    assert number_match(f"{value}{digits}", value) == 0.0
    assert number_match(f"{digits}{value}", value) == 0.0


@pytest.mark.parametrize("answer", ["", " ", "\n\n\n", "...", ' ". -'])
def test_an_answer_without_a_letter_or_digit_is_empty(answer: str) -> None:
    assert degenerate_kind(answer, [1, 2, 3]) == "empty"


@pytest.mark.parametrize("ids", [[5] * 8, [1, 2] * 4, [1, 2, 3, 1, 2, 3, 1, 2], [9, 9, 9, *[7] * 8]])
def test_an_answer_that_ends_in_a_short_cycle_is_repeating(ids: list[int]) -> None:
    assert degenerate_kind("the the", ids) == "repeating"


@pytest.mark.parametrize("ids", [[5] * 7, [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4] * 2, [*[7] * 8, 1]])
def test_short_or_varied_answers_are_not_degenerate(ids: list[int]) -> None:
    assert degenerate_kind("a word", ids) is None


# RULER's metrics (scripts/eval/synthetic/constants.py) on hand-made answers, and the whole-word ones beside them.
@pytest.mark.parametrize(
    ("answer", "expected", "ruler", "whole"),
    [
        ("1234567 and 7654321", ["1234567", "7654321"], 1.0, 1.0),
        ("only 1234567", ["1234567", "7654321"], 0.5, 0.5),
        ("12345678, 7654321", ["1234567", "7654321"], 1.0, 0.5),
        ("AAAAA BBBBB", ["aaaaa", "bbbbb", "ccccc", "ddddd"], 0.5, 0.5),
        ("season", ["sea", "son"], 1.0, 0.0),
        ("sea_son", ["sea"], 1.0, 0.0),
        ("amber-anchor.", ["amber-anchor"], 1.0, 1.0),
        ("1 234 567", ["1234567"], 0.0, 0.0),
        ("number1234567!", ["1234567"], 1.0, 1.0),
        ("", ["1234567"], 0.0, 0.0),
    ],
)
def test_all_expected_strings_are_counted_anywhere_or_whole(
    answer: str, expected: list[str], ruler: float, whole: float
) -> None:
    assert string_match_all(answer, expected) == ruler
    assert whole_match_all(answer, expected) == whole


@pytest.mark.parametrize(
    ("answer", "expected", "ruler", "whole"),
    [
        ("In Paris.", ["paris", "Lutetia"], 1.0, 1.0),
        ("Parisian", ["Paris"], 1.0, 0.0),
        ("Rome", ["Paris", "Lutetia"], 0.0, 0.0),
    ],
)
def test_any_alternative_is_enough(answer: str, expected: list[str], ruler: float, whole: float) -> None:
    assert string_match_part(answer, expected) == ruler
    assert whole_match_part(answer, expected) == whole


def test_only_as_many_candidates_count_as_are_expected() -> None:
    assert first_match_all("A1B2C", ["1"], ["2"]) == 1.0
    assert first_match_all("22, 11", ["11"], ["22"]) == 0.0
    assert first_match_all("11, 11, 33, 22", ["11", "22"], ["33"]) == 0.5
    assert first_match_all("it is 11, not 22", ["11"], ["22", "33"]) == 1.0
    assert first_match_all("112", ["11"], ["22"]) == 0.0


@given(st.text(alphabet="ab1 2_-", max_size=30), st.sampled_from(["a", "ab", "1", "12", "a-b", "1a"]))
def test_whole_matches_are_those_of_the_regular_expression(answer: str, expected: str) -> None:
    touching = r"\d" if expected.isdecimal() else r"\w"
    found = re.search(rf"(?<!{touching}){re.escape(expected)}(?!{touching})", answer)
    assert whole_match_all(answer, [expected]) == float(found is not None)
    assert string_match_all(answer, [expected]) >= whole_match_all(answer, [expected])


def test_every_metric_is_named_with_its_version_and_scored_beside_the_deciding_one() -> None:
    for name in METRICS:
        scores = score_all("1234567", ["1234567"], ["7654321"], metric=name)
        assert next(iter(scores)) == f"{name}/1"
        assert set(scores.values()) == {1.0}
        assert len(scores) >= 2


def test_the_final_answer_follows_the_thoughts() -> None:
    assert final_answer("<think>1234567?</think> 7654321") == " 7654321"
    assert final_answer("1234567?</think>no") == "no"
    assert final_answer("<think>it may be 1234567") == ""
    assert final_answer(" 1234567.") == " 1234567."
