"""Scores: whole numbers only, and what counts as babbling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxext.evaluation.scoring import degenerate_kind, number_match

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
