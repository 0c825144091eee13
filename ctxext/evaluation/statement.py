"""One sentence of a report, with what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ctxext.evaluation.arms import Arm
from ctxext.evaluation.statistics import Proportion

Verdict = Literal["shown", "not shown", "worse", "no claim", "not worse", "not decided", "reported"]


@dataclass(frozen=True)
class Statement:
    """One sentence with what it rests on.

    Attributes:
        topic: `extension` (the claim), `gain` (another arm against the control arm), `before_after`, `inside`,
            `short_loss`, `prompts`, `effective_length`, `tail`, `chance`, `shortest`, `degenerate`, `perplexity` or
            `coverage`.
        lead: how the sentence begins, up to the colon: its verdict, for those who skim.
        headline: belongs at the top of a report.
        numbers: the sentence's counts, intervals and p value, JSON-able.
    """

    topic: str
    verdict: Verdict
    lead: str
    detail: str
    recorded: bool = False
    headline: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Lead and detail together."""
        return f"{self.lead}: {self.detail}."


def origin(arm: Arm) -> str:
    """How a sentence about recorded arms begins."""
    return "Recorded on another machine: " if arm.recorded else ""


def share_numbers(share: Proportion) -> dict[str, Any]:
    """A share for programs."""
    numbers: dict[str, Any] = {
        "count": share.num_successes,
        "of": share.num_trials,
        "wilson_95": [share.low, share.high],
    }
    if share.num_clusters is not None:
        numbers |= {"num_clusters": share.num_clusters, "num_effective": share.num_effective}
    return numbers


def listed(texts: Sequence[str]) -> str:
    """'2,048, 4,096 and 8,192'."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
