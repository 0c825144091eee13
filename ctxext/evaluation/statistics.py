"""Intervals and paired comparisons. Nothing here knows what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Proportion:
    """A share of successes among independent trials with its Wilson 95% interval (Wilson 1927)."""

    num_successes: int
    num_trials: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The point estimate."""
        return self.num_successes / self.num_trials

    def text(self) -> str:
        """'10 of 16 (0.39-0.82)'."""
        return f"{self.num_successes} of {self.num_trials} ({self.low:.2f}-{self.high:.2f})"


def wilson(num_successes: int, num_trials: int, confidence: float = 0.95) -> Proportion:
    """Wilson score interval.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(f"{num_successes} successes of {num_trials} trials is not a proportion")
    interval = stats.binomtest(num_successes, num_trials).proportion_ci(confidence, method="wilson")
    return Proportion(num_successes, num_trials, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class PairedComparison:
    """Two arms on the same prompts. `p_value` is the exact two-sided McNemar test."""

    num_pairs: int
    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float

    @property
    def first(self) -> Proportion:
        """Successes of the first arm."""
        return wilson(self.both + self.only_first, self.num_pairs)

    @property
    def second(self) -> Proportion:
        """Successes of the second arm."""
        return wilson(self.both + self.only_second, self.num_pairs)


def mcnemar(pairs: Iterable[tuple[bool, bool]]) -> PairedComparison:
    """Exact McNemar test (McNemar 1947; binomial form) over pairs of outcomes of independent prompts.

    Raises:
        ValueError: no pairs.
    """
    outcomes = list(pairs)
    if not outcomes:
        raise ValueError("no pairs to compare")
    counts = {(a, b): outcomes.count((a, b)) for a in (True, False) for b in (True, False)}
    only_first, only_second = counts[True, False], counts[False, True]
    discordant = only_first + only_second
    p_value = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return PairedComparison(
        num_pairs=len(outcomes),
        both=counts[True, True],
        only_first=only_first,
        only_second=only_second,
        neither=counts[False, False],
        p_value=p_value,
    )


@dataclass(frozen=True)
class MeanDifference:
    """Mean of paired differences with its 95% t interval."""

    num_pairs: int
    mean: float
    low: float
    high: float


def paired_difference(differences: list[float]) -> MeanDifference:
    """Student's t interval of the mean of paired differences; the interval is infinite for one pair.

    Raises:
        ValueError: no differences.
    """
    if not differences:
        raise ValueError("no pairs to compare")
    count = len(differences)
    mean = sum(differences) / count
    if count == 1:
        return MeanDifference(1, mean, float("-inf"), float("inf"))
    variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
    half = float(stats.t.ppf(0.975, count - 1)) * (variance / count) ** 0.5
    return MeanDifference(count, mean, mean - half, mean + half)
