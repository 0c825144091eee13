"""The self-check of a backend that is not ours: the same prompt asked twice must get the same answer."""

from __future__ import annotations

from collections.abc import Sequence

from ctxext.evaluation.backend import SelfCheck


def compared(sample_id: str, first: Sequence[int], again: Sequence[int], *, other: str) -> SelfCheck:
    """What comes out when an answer is put beside another one to the same prompt."""
    place = next((i for i, (a, b) in enumerate(zip(first, again, strict=False)) if a != b), None)
    if place is None and len(first) != len(again):
        place = min(len(first), len(again))
    if place is None:
        return SelfCheck(sample_id, "identical", num_tokens=len(again), other=other)
    return SelfCheck(sample_id, "different", num_tokens=len(again), first_difference=place, other=other)
