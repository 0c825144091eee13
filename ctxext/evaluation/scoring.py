"""From an answer's text to a score. The version in each metric's name changes whenever a score could.

RULER's metrics look for lower-cased substrings, so a longer number or word that contains the expected one counts, and
so does a list of everything in the text. `whole_match_*` wants whole numbers and words, and `first_match_all` counts
only as many candidates as were asked for; a difference between them and RULER's score tells which trap was hit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NUMBER_MATCH = "number_match/1"

# (answer, expected answers, wrong answers of the same kind that stood in the text) -> 0 to 1
Score = Callable[[str, Sequence[str], Sequence[str]], float]


def number_match(answer: str, expected: str) -> float:
    """1.0 when `expected` stands in the answer as a whole number, else 0.0.

    A longer number that contains it does not count (1234567 in 12345678), nor do digits split by spaces.
    """
    return float(re.search(rf"(?<!\d){re.escape(expected)}(?!\d)", answer) is not None)


def string_match_all(answer: str, expected: Sequence[str]) -> float:
    """RULER's metric: share of the expected strings that the answer contains, in lower case, anywhere."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


def string_match_part(answer: str, expected: Sequence[str]) -> float:
    """RULER's metric for alternatives: 1.0 when the answer contains any expected string, in lower case, anywhere."""
    return float(any(text.lower() in answer.lower() for text in expected))


def whole_match_all(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that stand in the answer as whole numbers or whole words, in any case."""
    return sum(bool(_places(answer, text)) for text in expected) / len(expected)


def whole_match_part(answer: str, expected: Sequence[str]) -> float:
    """1.0 when any expected string stands in the answer as a whole number or word, in any case."""
    return float(any(_places(answer, text) for text in expected))


def first_match_all(answer: str, expected: Sequence[str], distractors: Sequence[str]) -> float:
    """Share of the expected strings among as many candidates as are expected, in the order the answer names them.

    Candidates are the expected strings and the distractors: naming everything that stood in the text gains nothing.
    """
    found = [
        (min(places), text) for text in dict.fromkeys((*expected, *distractors)) if (places := _places(answer, text))
    ]
    named = {text for _, text in sorted(found)[: len(expected)]}
    return sum(text in named for text in expected) / len(expected)


def _places(answer: str, text: str) -> list[int]:
    """Where `text` stands as a whole: no digit touches a number, no letter, digit or underscore anything else."""
    haystack, wanted, places = answer.lower(), text.lower(), list[int]()
    touches = str.isdecimal if text.isdecimal() else _is_word
    start = haystack.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        if not (touches(haystack[start - 1 : start]) or touches(haystack[end : end + 1])):
            places.append(start)
        start = haystack.find(wanted, start + 1)
    return places


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


@dataclass(frozen=True)
class Metric:
    """A metric by name.

    Attributes:
        version: changes whenever a score could.
    """

    name: str
    version: int
    score: Score
    summary: str

    @property
    def versioned(self) -> str:
        """How samples name it."""
        return f"{self.name}/{self.version}"


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "number_match",
            1,
            lambda answer, expected, distractors: number_match(answer, expected[0]),
            "the expected number as a whole number",
        ),
        Metric(
            "string_match_all",
            1,
            lambda answer, expected, distractors: string_match_all(answer, expected),
            "RULER: share of expected strings contained, lower-cased",
        ),
        Metric(
            "string_match_part",
            1,
            lambda answer, expected, distractors: string_match_part(answer, expected),
            "RULER: any expected string contained, lower-cased",
        ),
        Metric(
            "whole_match_all",
            1,
            lambda answer, expected, distractors: whole_match_all(answer, expected),
            "share of expected strings as whole numbers or words",
        ),
        Metric(
            "whole_match_part",
            1,
            lambda answer, expected, distractors: whole_match_part(answer, expected),
            "any expected string as a whole number or word",
        ),
        Metric(
            "first_match_all",
            1,
            first_match_all,
            "share of expected strings among the first candidates named, as many as expected",
        ),
    )
}
# What is reported beside the deciding metric: of several answers all are wanted, or of alternatives any.
_ALL = ("string_match_all", "whole_match_all", "first_match_all")
_PART = ("string_match_part", "whole_match_part")
BESIDE: dict[str, tuple[str, ...]] = {
    "number_match": ("number_match", "string_match_all"),
    **dict.fromkeys(_ALL, _ALL),
    **dict.fromkeys(_PART, _PART),
}


def score_all(
    answer: str, expected: Sequence[str], distractors: Sequence[str] = (), *, metric: str
) -> dict[str, float]:
    """The deciding metric's score and those reported beside it, by versioned name, the deciding one first."""
    names = (metric, *(name for name in BESIDE[metric] if name != metric))
    return {METRICS[name].versioned: METRICS[name].score(answer, expected, distractors) for name in names}


def final_answer(text: str) -> str:
    """What a chat model says after thinking aloud; nothing when it never stopped thinking."""
    _, mark, after = text.rpartition("</think>")
    return after if mark or not text.lstrip().startswith("<think>") else ""


def degenerate_kind(answer: str, answer_ids: list[int], *, cut_off: bool = False) -> str | None:
    """`empty`, `repeating`, `endless` or None: babbling beyond the model's range is another failure than being wrong.

    Args:
        cut_off: the answer ran into its token budget where a stop was expected (a chat model ends its turn; a base
            model that completes a text never stops by itself).
    """
    if not any(character.isalnum() for character in answer):
        return "empty"
    if len(answer_ids) >= 8:
        for period in (1, 2, 3):
            tail = answer_ids[-8:]
            if all(tail[i] == tail[i - period] for i in range(period, len(tail))):
                return "repeating"
    return "endless" if cut_off else None
