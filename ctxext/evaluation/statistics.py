"""Intervals and paired comparisons. Nothing here knows what was measured.

Samples that share something (a haystack) rise and fall together: they form a cluster and count for less than as many
independent samples. Shares of clustered samples get Wilson's interval with the effective number of samples (Korn and
Graubard 1998; Franco et al. 2019 compare the alternatives), differences between two arms a test that flips whole
clusters. Where every sample is a cluster of its own, both are exactly Wilson's interval and McNemar's test.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

SIGNIFICANCE_LEVEL = 0.05
# So many prompts or clusters must speak for a side before an exact two-sided test can be significant: 2^(1-6) = 0.031.
FEWEST_UNITS = math.ceil(1 - math.log2(SIGNIFICANCE_LEVEL))
_MAX_DISTINCT_SUMS = 1 << 16
_NUM_RANDOM_FLIPS = 1 << 15


@dataclass(frozen=True)
class Proportion:
    """A share of successes with its Wilson 95% interval (Wilson 1927).

    Attributes:
        num_clusters: groups of trials that are not independent of each other; None when all trials are independent.
        num_effective: independent trials that would be as telling; None when all trials are independent.
    """

    num_successes: int
    num_trials: int
    low: float
    high: float
    num_clusters: int | None = None
    num_effective: float | None = None

    @property
    def value(self) -> float:
        """The point estimate."""
        return self.num_successes / self.num_trials

    def text(self) -> str:
        """'10 of 16 (0.39-0.82)'; '10 of 16 in 4 clusters (0.24-0.90)'."""
        clusters = "" if self.num_clusters is None else f" in {counted(self.num_clusters, 'cluster')}"
        return f"{self.num_successes} of {self.num_trials}{clusters} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class MeanScore:
    """Mean of scores between 0 and 1 with a 95% interval.

    The interval is Wilson's for as many right and wrong answers; scores between 0 and 1 vary less than that, so for
    them it is too wide rather than too narrow.
    """

    num_samples: int
    num_clusters: int
    num_effective: float
    value: float
    low: float
    high: float

    def text(self) -> str:
        """'0.62 (0.39-0.82)'."""
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


def wilson(num_successes: int, num_trials: int, confidence: float = 0.95) -> Proportion:
    """Wilson score interval of independent trials.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(f"{num_successes} successes of {num_trials} trials is not a proportion")
    interval = stats.binomtest(num_successes, num_trials).proportion_ci(confidence, method="wilson")
    return Proportion(num_successes, num_trials, float(interval.low), float(interval.high))


def clustered_wilson(outcomes: Sequence[bool], clusters: Sequence[Hashable], confidence: float = 0.95) -> Proportion:
    """Wilson score interval of trials of which some share a cluster; exactly `wilson` when none does.

    Raises:
        ValueError: no trials, or not one cluster name for every trial.
    """
    scores = [float(outcome) for outcome in outcomes]
    num_clusters, num_effective = effective_samples(scores, clusters)
    right = sum(outcomes)
    if num_clusters == len(scores):
        return wilson(right, len(scores), confidence)
    low, high = _wilson_ends(right / len(scores), num_effective, confidence)
    return Proportion(right, len(scores), low, high, num_clusters, num_effective)


def mean_score(scores: Sequence[float], clusters: Sequence[Hashable], confidence: float = 0.95) -> MeanScore:
    """Mean of scores between 0 and 1; for scores of 0 and 1 the same interval as `clustered_wilson`.

    Raises:
        ValueError: no scores, one outside 0 to 1, or not one cluster name for every score.
    """
    if any(not 0.0 <= score <= 1.0 for score in scores):
        raise ValueError("a score lies outside 0 to 1")
    num_clusters, num_effective = effective_samples(scores, clusters)
    mean = math.fsum(scores) / len(scores)
    low, high = _wilson_ends(mean, num_effective, confidence)
    return MeanScore(len(scores), num_clusters, num_effective, mean, low, high)


def effective_samples(scores: Sequence[float], clusters: Sequence[Hashable]) -> tuple[int, float]:
    """Number of clusters, and of independent samples that would be as telling.

    The number of samples divided by the design effect (Kish 1965): the variance of the mean that differences between
    clusters show over the variance that independent samples would have. It is at least 1, because an apparent gain
    from clusters that happen to be alike is luck, and at most what it is when all samples of a cluster agree. Where
    all scores are equal nothing can be estimated, and each cluster counts once.

    Raises:
        ValueError: no scores, or not one cluster name for every score.
    """
    if not scores or len(scores) != len(clusters):
        raise ValueError(f"{len(scores)} scores with {len(clusters)} cluster names")
    sizes = Counter(clusters)
    count, num_clusters = len(scores), len(sizes)
    if num_clusters == count:
        return num_clusters, float(count)
    mean = math.fsum(scores) / count
    independent = math.fsum((score - mean) ** 2 for score in scores) / (count - 1) / count
    if num_clusters == 1 or independent <= 1e-18:
        return num_clusters, float(num_clusters)
    excess: defaultdict[Hashable, list[float]] = defaultdict(list)
    for score, cluster in zip(scores, clusters, strict=True):
        excess[cluster].append(score - mean)
    between = math.fsum(math.fsum(values) ** 2 for values in excess.values()) / count**2
    effect = max(1.0, between * num_clusters / (num_clusters - 1) / independent)
    fewest = count**2 / sum(size**2 for size in sizes.values())
    return num_clusters, max(count / effect, fewest)


def _wilson_ends(share: float, num_trials: float, confidence: float) -> tuple[float, float]:
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    scale = 1 + z**2 / num_trials
    middle = (share + z**2 / (2 * num_trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_trials + z**2 / (4 * num_trials**2))
    return (0.0 if share == 0 else max(0.0, middle - half)), (1.0 if share == 1 else min(1.0, middle + half))


@dataclass(frozen=True)
class PairedComparison:
    """Two arms on the same prompts, with an exact two-sided test.

    Attributes:
        first, second: successes of each arm.
        test: `McNemar` for independent prompts, `sign flip` over clusters of prompts otherwise.
        num_units: independent units: prompts or clusters.
        num_differing: units that speak for one side; the rest decide nothing.
    """

    num_pairs: int
    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    first: Proportion
    second: Proportion
    test: Literal["McNemar", "sign flip"]
    num_units: int
    num_differing: int

    @property
    def better(self) -> Literal["first", "second"] | None:
        """The arm that is shown to be better, if any."""
        if self.p_value >= SIGNIFICANCE_LEVEL:
            return None
        return "first" if self.only_first > self.only_second else "second"

    @property
    def decidable(self) -> bool:
        """Whether these units could have shown a difference, had they all spoken for one side."""
        return self.num_differing >= FEWEST_UNITS

    def verdict(self, first: str, second: str) -> str:
        """The outcome in words, the p value included."""
        p_value = f"p = {self.p_value:.3g}"
        if self.better:
            winner, loser = (first, second) if self.better == "first" else (second, first)
            return f"{winner} is better than {loser} ({p_value})"
        if self.only_first == self.only_second == 0:
            return f"{first} and {second} answer every prompt alike"
        if not self.decidable:
            unit = "prompt" if self.test == "McNemar" else "cluster"
            differ = "differs" if self.num_differing == 1 else "differ"
            return (
                f"not decided ({p_value}): only {counted(self.num_differing, unit)} {differ}, "
                f"and fewer than {FEWEST_UNITS} can show nothing"
            )
        return f"no difference shown ({p_value})"


def mcnemar(pairs: Iterable[tuple[bool, bool]]) -> PairedComparison:
    """Exact McNemar test (McNemar 1947; binomial form) over pairs of outcomes of independent prompts.

    Raises:
        ValueError: no pairs.
    """
    outcomes = list(pairs)
    return compare_paired(outcomes, range(len(outcomes)))


def compare_paired(pairs: Iterable[tuple[bool, bool]], clusters: Sequence[Hashable]) -> PairedComparison:
    """Compare two arms on the same prompts: McNemar's test, or a sign-flip test where prompts share a cluster.

    Raises:
        ValueError: no pairs, or not one cluster name for every pair.
    """
    outcomes = list(pairs)
    if not outcomes:
        raise ValueError("no pairs to compare")
    counts = Counter((bool(a), bool(b)) for a, b in outcomes)
    only_first, only_second = counts[True, False], counts[False, True]
    sums: defaultdict[Hashable, int] = defaultdict(int)
    for (a, b), cluster in zip(outcomes, clusters, strict=True):
        sums[cluster] += int(a) - int(b)
    independent = len(sums) == len(outcomes)
    if independent:
        discordant = only_first + only_second
        p_value = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    else:
        p_value = sign_flip(list(sums.values()))
    return PairedComparison(
        num_pairs=len(outcomes),
        both=counts[True, True],
        only_first=only_first,
        only_second=only_second,
        neither=counts[False, False],
        p_value=p_value,
        first=clustered_wilson([a for a, _ in outcomes], clusters),
        second=clustered_wilson([b for _, b in outcomes], clusters),
        test="McNemar" if independent else "sign flip",
        num_units=len(sums),
        num_differing=sum(total != 0 for total in sums.values()),
    )


def sign_flip(differences: Sequence[int], seed: int = 0) -> float:
    """Two-sided p value of the sum of `differences`, one a cluster: if neither arm were better, each could as well
    have had the other sign (Fisher 1935).

    All 2^n sign patterns count, by adding up how often each sum occurs; only where there are too many different sums,
    32,768 seeded patterns stand for them, the observed one among them (Phipson and Smyth 2010).
    """
    values = [abs(value) for value in differences if value]
    observed = abs(sum(differences))
    ways = {0: 1}
    for value in values:
        further: defaultdict[int, int] = defaultdict(int)
        for total, number in ways.items():
            further[total + value] += number
            further[total - value] += number
        if len(further) > _MAX_DISTINCT_SUMS:
            return _sampled_sign_flip(values, observed, seed)
        ways = dict(further)
    extreme = sum(number for total, number in ways.items() if abs(total) >= observed)
    return extreme / (1 << len(values))


def _sampled_sign_flip(values: Sequence[int], observed: int, seed: int) -> float:
    generator = random.Random(seed)
    extreme = 0
    for _ in range(_NUM_RANDOM_FLIPS - 1):
        bits = generator.getrandbits(len(values))
        total = sum(value if bits >> number & 1 else -value for number, value in enumerate(values))
        extreme += abs(total) >= observed
    return (extreme + 1) / _NUM_RANDOM_FLIPS


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of several tests, adjusted so that one false alarm among all of them stays as rare (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class ShareDifference:
    """Difference of two shares, first minus second, with a 95% interval."""

    first: MeanScore
    second: MeanScore
    low: float
    high: float
    num_pairs: int | None = None

    @property
    def value(self) -> float:
        """The point estimate."""
        return self.first.value - self.second.value


def share_difference(first: MeanScore, second: MeanScore) -> ShareDifference:
    """Newcombe's interval of the difference of two independent shares (Newcombe 1998, Stat. Med. 17:873, method 10).

    It combines the two Wilson intervals, so it stays honest where a bootstrap of all-right samples would have no width.
    """
    low, high = _combine(first, second, 0.0)
    return ShareDifference(first, second, low, high)


def paired_share_difference(
    pairs: Sequence[tuple[float, float]], clusters: Sequence[Hashable], confidence: float = 0.95
) -> ShareDifference:
    """Newcombe's interval of the difference of two paired shares (Newcombe 1998, Stat. Med. 17:2635, method 10).

    Scores may lie between 0 and 1; both Wilson intervals take the clusters into account.

    Raises:
        ValueError: no pairs, or not one cluster name for every pair.
    """
    first = mean_score([a for a, _ in pairs], clusters, confidence)
    second = mean_score([b for _, b in pairs], clusters, confidence)
    low, high = _combine(first, second, _continuity_corrected_correlation(pairs))
    return ShareDifference(first, second, low, high, len(pairs))


def _continuity_corrected_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    count = len(pairs)
    mean_a, mean_b = (math.fsum(side) / count for side in zip(*pairs, strict=True))
    scale = count**2 * math.sqrt(mean_a * (1 - mean_a) * mean_b * (1 - mean_b))
    if scale <= 1e-12:
        return 0.0
    # For zeros and ones this is ad - bc of the fourfold table; only a positive one is corrected.
    product = count * math.fsum((a - mean_a) * (b - mean_b) for a, b in pairs)
    return (max(product - count / 2, 0.0) if product > 0 else product) / scale


def _combine(first: MeanScore, second: MeanScore, correlation: float) -> tuple[float, float]:
    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 + b**2 - 2 * correlation * a * b))

    value = first.value - second.value
    low = value - distance(first.value - first.low, second.high - second.value)
    high = value + distance(first.high - first.value, second.value - second.low)
    return max(-1.0, low), min(1.0, high)


@dataclass(frozen=True)
class MeanDifference:
    """Mean of paired differences with its 95% t interval; `num_clusters` independent ones among `num_pairs`."""

    num_pairs: int
    mean: float
    low: float
    high: float
    num_clusters: int | None = None


def paired_difference(differences: Sequence[float], clusters: Sequence[Hashable] | None = None) -> MeanDifference:
    """Student's t interval of the mean of paired differences; the interval is infinite for one pair.

    Pairs of one cluster are averaged first and every cluster counts once.

    Raises:
        ValueError: no differences, or not one cluster name for every difference.
    """
    if not differences:
        raise ValueError("no pairs to compare")
    grouped: defaultdict[Hashable, list[float]] = defaultdict(list)
    for cluster, difference in zip(clusters or range(len(differences)), differences, strict=True):
        grouped[cluster].append(difference)
    values = [sum(members) / len(members) for members in grouped.values()]
    count = len(values)
    num_clusters = count if count < len(differences) else None
    mean = sum(values) / count
    if count == 1:
        return MeanDifference(len(differences), mean, float("-inf"), float("inf"), num_clusters)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(stats.t.ppf(0.975, count - 1)) * (variance / count) ** 0.5
    return MeanDifference(len(differences), mean, mean - half, mean + half, num_clusters)


def samples_for_lower_bound(threshold: float, num_misses: int = 0, confidence: float = 0.95) -> int:
    """Fewest independent samples whose Wilson lower bound exceeds `threshold` with `num_misses` wrong ones.

    Raises:
        ValueError: a threshold that no number of samples can exceed.
    """
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"no share of right answers has a lower bound above {threshold}")
    high = max(1, num_misses)
    while _lower(high, num_misses, confidence) <= threshold:
        high *= 2
    low = high // 2
    while high - low > 1:  # the bound rises with the number of samples
        middle = (low + high) // 2
        low, high = (middle, high) if _lower(middle, num_misses, confidence) <= threshold else (low, middle)
    return high


def _lower(num_samples: int, num_misses: int, confidence: float) -> float:
    if num_samples <= num_misses:
        return 0.0
    return _wilson_ends(1 - num_misses / num_samples, num_samples, confidence)[0]


def counted(number: int, noun: str) -> str:
    """'1 prompt', '1,200 prompts'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
