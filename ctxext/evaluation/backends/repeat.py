"""The self-check of a backend that is not ours: the same prompt asked twice must get the same answer."""

from __future__ import annotations

from collections.abc import Sequence

from ctxext.evaluation.backend import SelfCheck
from ctxext.evaluation.trunk import common_prefix


def compared(sample_id: str, first: Sequence[int], again: Sequence[int], *, other: str) -> SelfCheck:
    """What comes out when an answer is put beside another one to the same prompt."""
    place = common_prefix(first, again)
    if place == len(first) == len(again):
        return SelfCheck(sample_id, "identical", num_tokens=len(again), other=other)
    return SelfCheck(sample_id, "different", num_tokens=len(again), first_difference=place, other=other)
