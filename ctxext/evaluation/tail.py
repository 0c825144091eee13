"""The tail number: retrieval from the last tenth of the positions minus the first tenth, at the longest length.

An extended model that reads its old positions and none of the new ones keeps a good average over depths; this number
does not let it. Positions are token indices of the needle in the prompt, not depths: depth 0.9 of a haystack lies
before the last tenth of the prompt.

The same needle in the same haystack at both ends makes a pair, which removes what the text itself contributes. The
interval is Newcombe's for paired shares, with haystacks as clusters, rather than a bootstrap: resampling a handful of
all-right pairs would give an interval of no width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.statistics import (
    MeanScore,
    ShareDifference,
    counted,
    mean_score,
    paired_share_difference,
    share_difference,
)
from ctxext.evaluation.store import SampleResult

TENTH = 0.1


@dataclass(frozen=True)
class TailNumber:
    """Last tenth minus first tenth; -1 reads the beginning only, 0 reads both alike.

    Attributes:
        num_pairs: needles asked at both ends of the same haystack; 0 when the two ends have other haystacks.
    """

    length_tokens: int
    difference: ShareDifference
    num_pairs: int
    num_haystacks: int

    def text(self) -> str:
        """In words: '-0.40 (-0.71 to +0.02) at 4,096 tokens, 0.40 minus 0.80, ...'."""
        last, first = self.difference.first, self.difference.second
        basis = (
            f"{counted(self.num_pairs, 'needle')} at both ends of {counted(self.num_haystacks, 'haystack')}"
            if self.num_pairs
            else f"not paired, {counted(last.num_samples, 'sample')} against {first.num_samples}"
        )
        return (
            f"{self.difference.value:+.2f} ({self.difference.low:+.2f} to {self.difference.high:+.2f}) at "
            f"{self.length_tokens:,} tokens, {last.value:.2f} minus {first.value:.2f}, {basis}"
        )


@dataclass(frozen=True)
class NoTail:
    """Why there is no tail number."""

    reason: str


def tail_number(samples: Iterable[SampleResult]) -> TailNumber | NoTail:
    """The tail number at the longest length that was asked for, or why there is none.

    A longest length without scores is no reason to fall back on a shorter one: its tail is exactly what is unknown.

    Raises:
        ValueError: samples of different tasks.
    """
    asked = list(samples)
    if len({sample.task for sample in asked}) > 1:
        raise ValueError("a tail number is about one task")
    longest = max((sample.length_tokens for sample in asked), default=0)
    members = [s for s in asked if s.length_tokens == longest and s.status == "ok"]
    if not members:
        return NoTail(f"no sample has a score at {longest:,} tokens, the longest length" if longest else "no samples")
    first = [s for s in members if s.needle_position < TENTH * longest]
    last = [s for s in members if s.needle_position >= (1 - TENTH) * longest]
    if not first or not last:
        ends = " and ".join(name for name, group in (("first", first), ("last", last)) if not group)
        return NoTail(
            f"no scored needle lies in the {ends} tenth of the positions at {longest:,} tokens "
            "(depths 0.05 and 0.95 would)"
        )
    pairs = _pairs(first, last)
    if not pairs:
        return TailNumber(longest, share_difference(_mean(last), _mean(first)), 0, 0)
    haystacks = [haystack for haystack, _, _ in pairs]
    difference = paired_share_difference([(end, start) for _, end, start in pairs], haystacks)
    return TailNumber(longest, difference, len(pairs), len(set(haystacks)))


def _pairs(first: list[SampleResult], last: list[SampleResult]) -> list[tuple[str, float, float]]:
    """Cluster, score in the last tenth, score in the first, of every needle asked in both ends of one haystack."""
    ends: list[dict[tuple[str, str, str, str], list[float]]] = [defaultdict(list), defaultdict(list)]
    for group, scores in zip((last, first), ends, strict=True):
        for sample in group:
            scores[cluster_of(sample), sample.haystack_sha256, sample.key, sample.expected].append(sample.score)
    last_scores, first_scores = ends
    return [
        (needle[0], sum(scores) / len(scores), sum(first_scores[needle]) / len(first_scores[needle]))
        for needle, scores in sorted(last_scores.items())
        if needle in first_scores
    ]


def _mean(samples: list[SampleResult]) -> MeanScore:
    return mean_score([sample.score for sample in samples], [cluster_of(sample) for sample in samples])
