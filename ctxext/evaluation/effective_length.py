"""How far a model really reads: the longest length at which it still retrieves.

Two thresholds are in use and both are reported. RULER (Hsieh et al. 2024, arXiv:2404.06654) asks for more than 85.6%,
what Llama-2-7B reaches at 4,096 tokens; NoLiMa (Modarressi et al. 2025, arXiv:2502.05167) for 85% of what the same
model reaches on short prompts. Each is judged by the point estimate, as others do, and by the lower end of a 95%
interval, which a handful of samples cannot pass.

Nothing is interpolated: the result is a length that was tested, such that it and every shorter tested length pass. A
recovery beyond the first failure does not count, and no length between two tested ones is ever claimed. RULER's name
*effective length* belongs to the mean of its 13 tasks; what a needle alone shows is called needle-effective length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ctxext.errors import UsageError
from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.statistics import MeanScore, mean_score, samples_for_lower_bound
from ctxext.evaluation.store import SampleResult, score_of

ABSOLUTE_THRESHOLD = 0.856
RELATIVE_THRESHOLD = 0.85

RULER_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)

Definition = Literal["absolute", "relative"]
By = Literal["estimate", "bound"]


@dataclass(frozen=True)
class EffectiveLength:
    """The longest tested length at which it and all shorter tested lengths pass.

    Attributes:
        definition: `absolute` (0.856) or `relative` (0.85 of the model's own score at the shortest length).
        by: `estimate`, or `bound` for the lower end of the 95% interval.
        threshold: what the share of right answers must exceed (`absolute`) or reach (`relative`).
        tokens: None when already the shortest tested length fails.
        first_failed_tokens: the next tested length; None when every tested length passes.
    """

    definition: Definition
    by: By
    threshold: float
    tokens: int | None
    shortest_tokens: int
    longest_tokens: int
    first_failed_tokens: int | None

    @property
    def is_open(self) -> bool:
        """Whether every tested length passes, so that the true length may be greater."""
        return self.first_failed_tokens is None

    def text(self) -> str:
        """'>= 12,288 tokens (longest tested)', '4,096 tokens (8,192 fails)', 'below 2,048 tokens (shortest tested)'."""
        if self.tokens is None:
            return f"below {self.shortest_tokens:,} tokens (shortest tested)"
        if self.first_failed_tokens is None:
            return f">= {self.tokens:,} tokens (longest tested)"
        return f"{self.tokens:,} tokens ({self.first_failed_tokens:,} fails)"


def scores_by_length(samples: Iterable[SampleResult]) -> dict[int, MeanScore]:
    """Mean score of each tested length, all depths together; a length without a scored sample was not tested.

    Raises:
        ValueError: samples of different tasks, whose mean says nothing.
    """
    scored = [sample for sample in samples if sample.status == "ok"]
    if len({sample.task for sample in scored}) > 1:
        raise ValueError("an effective length is about one task")
    return {
        length: score
        for length in sorted({sample.length_tokens for sample in scored})
        if (score := score_of(sample for sample in scored if sample.length_tokens == length))
    }


def effective_length(scores: Mapping[int, MeanScore], definition: Definition, by: By) -> EffectiveLength:
    """The needle-effective length from the scores of each tested length.

    For `relative` the model's own short score is that of the shortest tested length. Its uncertainty counts: by
    `bound`, the lower end of the 95% interval of (score - 0.85 x short score) must not be negative, both scores being
    independent (Zou and Donner 2008, Stat. Med. 27:1693). A model that gets nothing right on short prompts has none.

    Raises:
        ValueError: no tested length.
    """
    if not scores:
        raise ValueError("no length was tested")
    lengths = sorted(scores)
    short = scores[lengths[0]]
    if definition == "absolute":
        threshold = ABSOLUTE_THRESHOLD
        passed = [(s.value if by == "estimate" else s.low) > threshold for s in (scores[n] for n in lengths)]
    else:
        threshold = RELATIVE_THRESHOLD * short.value
        passed = [short.value > 0, *(_reaches(scores[n], short, by) for n in lengths[1:])]
    return _until_first_failure(lengths, passed, definition, by, threshold)


def needle_effective_lengths(samples: Iterable[SampleResult]) -> list[EffectiveLength]:
    """Both definitions, each by estimate and by bound; empty when nothing was scored.

    Raises:
        ValueError: samples of different tasks.
    """
    scores = scores_by_length(samples)
    if not scores:
        return []
    kinds: list[tuple[Definition, By]] = [
        ("absolute", "estimate"),
        ("absolute", "bound"),
        ("relative", "estimate"),
        ("relative", "bound"),
    ]
    return [effective_length(scores, definition, by) for definition, by in kinds]


@dataclass(frozen=True)
class Hole:
    """A depth that is surely below the threshold although the length as a whole passes."""

    depth: float
    score: MeanScore


def holes(samples: Iterable[SampleResult], up_to_tokens: int, threshold: float = ABSOLUTE_THRESHOLD) -> list[Hole]:
    """Depths that an average over all depths hides: pooled over the lengths up to `up_to_tokens`, their upper bound
    is below the threshold, at a confidence that allows for looking at every depth (Bonferroni)."""
    scored = [s for s in samples if s.status == "ok" and s.length_tokens <= up_to_tokens]
    depths = sorted({sample.depth for sample in scored})
    found = []
    for depth in depths:
        members = [sample for sample in scored if sample.depth == depth]
        score = mean_score([s.score for s in members], [cluster_of(s) for s in members], 1 - 0.05 / len(depths))
        if score.high < threshold:
            found.append(Hole(depth, score))
    return found


def bound_feasibility(num_independent: Mapping[int, int], threshold: float = ABSOLUTE_THRESHOLD) -> str:
    """What a suite can show at best, to be said before the run.

    Args:
        num_independent: independent samples (haystacks, where samples share them) of each length, all depths together.
    """
    without, one = (samples_for_lower_bound(threshold, misses) for misses in (0, 1))
    needed = f"a lower 95% bound above {threshold:g} needs {without} independent samples without a miss, {one} with one"
    short = {length: count for length, count in sorted(num_independent.items()) if count < without}
    if not short:
        return f"Every length has enough samples for the effective length by its lower bound ({needed})."
    places = ", ".join(f"{count} at {length:,} tokens" for length, count in short.items())
    first = min(short)
    reach = [length for length in num_independent if length < first]
    until = f"which cannot exceed {max(reach):,} tokens" if reach else "which cannot be given at all"
    return f"Too few samples for the effective length by its lower bound, {until}: {needed}; the suite has {places}."


def ruler_effective_length(task_means: Mapping[int, Mapping[str, float]]) -> EffectiveLength:
    """RULER's effective length: the mean of its 13 tasks, each counting once, exceeds 0.856 up to there.

    Args:
        task_means: by length, each task's score between 0 and 1.

    Raises:
        UsageError: a length lacks some of the 13 tasks, so that its mean is not RULER's.
        ValueError: no tested length.
    """
    if not task_means:
        raise ValueError("no length was tested")
    for length, means in sorted(task_means.items()):
        missing = [task for task in RULER_TASKS if task not in means]
        if missing:
            raise UsageError(
                "RULER's effective length is the mean of its 13 tasks",
                where=f"{length:,} tokens",
                got=f"no score for {', '.join(missing)}",
                hint="Report the needle-effective length instead.",
            )
    lengths = sorted(task_means)
    averages = [math.fsum(task_means[length][task] for task in RULER_TASKS) / len(RULER_TASKS) for length in lengths]
    passed = [average > ABSOLUTE_THRESHOLD for average in averages]
    return _until_first_failure(lengths, passed, "absolute", "estimate", ABSOLUTE_THRESHOLD)


def independent_samples(places: Iterable[tuple[int, str]]) -> dict[int, int]:
    """Independent samples of each length, from pairs of length and haystack."""
    seen: dict[int, set[str]] = {}
    for length, haystack in places:
        seen.setdefault(length, set()).add(haystack)
    return {length: len(haystacks) for length, haystacks in sorted(seen.items())}


def _until_first_failure(
    lengths: Sequence[int], passed: Sequence[bool], definition: Definition, by: By, threshold: float
) -> EffectiveLength:
    """A length that passes beyond the first failure does not count; `lengths` ascend."""
    num_passed = passed.index(False) if False in passed else len(lengths)
    return EffectiveLength(
        definition=definition,
        by=by,
        threshold=threshold,
        tokens=lengths[num_passed - 1] if num_passed else None,
        shortest_tokens=lengths[0],
        longest_tokens=lengths[-1],
        first_failed_tokens=lengths[num_passed] if num_passed < len(lengths) else None,
    )


def _reaches(score: MeanScore, short: MeanScore, by: By) -> bool:
    margin = score.value - RELATIVE_THRESHOLD * short.value
    if by == "bound":
        margin -= math.hypot(score.value - score.low, RELATIVE_THRESHOLD * (short.high - short.value))
    return margin >= -1e-12
