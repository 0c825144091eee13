"""Copies are counted: exact ones over everything, near ones inside a bounded sample."""

from __future__ import annotations

import pytest

from ctxext.data.duplicates import find_duplicates
from ctxext.data.words import document

TEXTS = [document(str(number), 20) for number in range(60)]


def changed(text: str, share: float) -> str:
    """A text whose last part is another one."""
    words = text.split()
    kept = round(len(words) * (1 - share))
    return " ".join([*words[:kept], *document(text, 40).split()[: len(words) - kept]])


def test_different_texts_are_no_duplicates() -> None:
    found = find_duplicates(TEXTS)
    assert (found.num_documents, found.num_exact, found.num_near) == (60, 0, 0)
    assert found.num_words == sum(len(text.split()) for text in TEXTS)


def test_exact_copies_are_counted_whatever_their_case_and_line_breaks() -> None:
    copies = [TEXTS[3].upper(), "\n".join(TEXTS[4].split()), TEXTS[5], TEXTS[5]]
    found = find_duplicates([*TEXTS, *copies])
    assert found.num_exact == 4
    assert found.exact_words == sum(len(TEXTS[number].split()) for number in (3, 4, 5, 5))
    assert found.num_near == 4
    assert found.examples == ()
    assert found.exact_share == pytest.approx(4 / 64)


def test_near_copies_are_counted_and_named_and_far_ones_are_not() -> None:
    near = [changed(text, 0.04) for text in TEXTS[:10]]
    far = [changed(text, 0.5) for text in TEXTS[10:40]]
    found = find_duplicates([*TEXTS, *near, *far])
    assert found.num_exact == 0
    assert 9 <= found.num_near <= 10
    assert found.examples
    assert all(other == number - 60 for number, other in found.examples)


def test_the_order_of_words_matters() -> None:
    words = TEXTS[0].split()
    assert find_duplicates([TEXTS[0], " ".join(reversed(words))]).num_exact == 0
    assert find_duplicates(["a b c", "a b c", "a c b"]).num_exact == 1


def test_beyond_a_bound_near_copies_are_looked_for_in_a_sample_and_that_is_said() -> None:
    texts = TEXTS * 10
    found = find_duplicates(texts, max_near=100)
    assert found.num_compared == 100
    assert found.num_exact == 540
    # A tenth of every ten copies is in the sample: about 45 of 100 have an earlier one there.
    assert 25 <= found.num_near <= 60
    assert "inside a sample of 100" in found.sentence()
    assert find_duplicates(texts, max_near=100) == found
    assert "sample" not in find_duplicates(texts).sentence()


def test_empty_and_very_short_texts_are_counted() -> None:
    found = find_duplicates(["", "one", "one", "two words", ""])
    assert found.num_documents == 5
    assert found.num_exact == 2
    assert find_duplicates([]).num_documents == 0
    assert find_duplicates([]).sentence()
