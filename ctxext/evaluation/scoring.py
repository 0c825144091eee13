"""From an answer's text to a score. The version in each metric's name changes whenever a score could."""

from __future__ import annotations

import re

NUMBER_MATCH = "number_match/1"


def number_match(answer: str, expected: str) -> float:
    """1.0 when `expected` stands in the answer as a whole number, else 0.0.

    A longer number that contains it does not count (1234567 in 12345678), nor do digits split by spaces.
    """
    return float(re.search(rf"(?<!\d){re.escape(expected)}(?!\d)", answer) is not None)


def degenerate_kind(answer: str, answer_ids: list[int]) -> str | None:
    """`empty`, `repeating` or None: babbling beyond the model's range is another failure than being wrong."""
    if not any(character.isalnum() for character in answer):
        return "empty"
    if len(answer_ids) >= 8:
        for period in (1, 2, 3):
            tail = answer_ids[-8:]
            if all(tail[i] == tail[i - period] for i in range(period, len(tail))):
                return "repeating"
    return None
