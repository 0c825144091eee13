"""How wrong answers are wrong, in a few words: what people look for first when a cell is dark."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ctxext.evaluation.arms import Arm, without_controls
from ctxext.evaluation.store import SampleResult

_NUMBER = re.compile(r"\d+")


def failure_kind(sample: SampleResult) -> str:
    """'repeating', 'nearly right: one digit off', 'another value', 'incomplete: 2 of 4', 'no value', ...; '' if right.

    A number of the expected kind that is not the expected one is another value: a distractor, or one that the model
    made up.
    """
    if sample.score >= 1.0:
        return ""
    if sample.status != "ok":
        return sample.status.replace("_", " ")
    if sample.degenerate:
        return sample.degenerate
    expected = sample.answers or [sample.expected]
    found = [text for text in expected if text.lower() in sample.answer.lower()]
    if len(expected) > 1 and found:
        return f"incomplete: {len(found)} of {len(expected)}"
    if found:
        return "inside something longer"
    if any(_NUMBER.fullmatch(text) for text in expected):
        return _number_kind(sample.answer, [text for text in expected if _NUMBER.fullmatch(text)])
    return "another value"


def _number_kind(answer: str, expected: Sequence[str]) -> str:
    numbers = _NUMBER.findall(answer)
    for number in numbers:
        for wanted in expected:
            if len(number) == len(wanted) and sum(a != b for a, b in zip(number, wanted, strict=True)) == 1:
                return "nearly right: one digit off"
            if len(number) >= 3 and (number in wanted or wanted.startswith(number)):
                return "nearly right: a part of it"
    return "another number" if any(len(number) >= 3 for number in numbers) else "no number"


def wrong_examples(arm: Arm, count: int = 5) -> list[SampleResult]:
    """The worst wrong answers: on the shortest prompts first, since those should be easiest, degenerate ones before."""
    wrong = [sample for sample in without_controls(arm).scored if sample.score < 1.0]
    return sorted(wrong, key=worst_first)[:count]


def worst_first(sample: SampleResult) -> tuple[int, bool, float, float, int]:
    """Sorts wrong answers: those to the shortest prompts, which should be easiest, come first, degenerate ones before
    others."""
    return sample.length_tokens, sample.degenerate is None, sample.score, sample.depth, sample.index


def failure_counts(arm: Arm) -> dict[str, int]:
    """How often each kind occurs among an arm's wrong answers, the most frequent first."""
    counts: dict[str, int] = {}
    for sample in without_controls(arm).scored:
        if kind := failure_kind(sample).partition(":")[0]:
            counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
