"""Tokens per word, and when to worry."""

from __future__ import annotations

import math

import pytest
from support import byte_tokenizer

from ctxext.data.fertility import Fertility, count_words, fertility


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Two words.", 3),
        ("don't", 3),
        ("self.assertEqual(a, b_c)", 8),
        ("naïve café", 2),
        ("日本語です。", 6),
        ("한국 사람", 2),
        ("abc日本x", 4),
        (" \n\t", 0),
    ],
)
def test_words_and_marks_are_counted_as_treebanks_do(text: str, count: int) -> None:
    assert count_words(text) == count


@pytest.mark.parametrize(
    ("tokens", "words", "level"), [(159, 100, "good"), (160, 100, "high"), (179, 100, "high"), (180, 100, "too high")]
)
def test_levels_begin_where_they_say(tokens: int, words: int, level: str) -> None:
    measured = Fertility(tokens, words)
    assert measured.level == level
    assert (measured.sentence() is None) == (level == "good")


def test_a_tokenizer_of_bytes_is_far_too_fertile() -> None:
    text = "hello world"
    measured = fertility([(text, len(byte_tokenizer()(text).input_ids))] * 3)
    assert measured.tokens_per_word == pytest.approx(5.5)
    assert "5.50 tokens a word is too high" in str(measured.sentence())


def test_without_words_there_is_no_number() -> None:
    assert math.isnan(fertility([]).tokens_per_word)
    assert fertility([]).level == "good"
