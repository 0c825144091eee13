"""Intervals and tests against published values, and the properties that any data must keep."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxext.evaluation.statistics import mcnemar, paired_difference, wilson

# Lower ends of Wilson 95% intervals when every trial succeeds: n / (n + 1.959964^2).
ALL_RIGHT = {1: 0.2065, 5: 0.5655, 10: 0.7225, 20: 0.8389, 100: 0.9630}
# Two-sided exact McNemar with all k discordant pairs on one side: 2^(1 - k).
ONE_SIDED = {1: 1.0, 5: 0.0625, 6: 0.03125, 8: 0.0078125, 10: 0.001953125}

trials = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
differences = st.lists(st.floats(-100, 100, allow_nan=False), min_size=2, max_size=40)


@pytest.mark.parametrize(("count", "low"), ALL_RIGHT.items())
def test_wilson_gives_the_published_lower_ends(count: int, low: float) -> None:
    interval = wilson(count, count)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(1.0)


def test_wilson_gives_the_textbook_interval_of_a_mixed_result() -> None:
    # 81 of 263, Newcombe 1998, table I, method 3: 0.2553 to 0.3662.
    interval = wilson(81, 263)
    assert (interval.low, interval.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


@given(trials)
def test_wilson_contains_the_estimate_and_stays_inside_0_and_1(case: tuple[int, int]) -> None:
    interval = wilson(*case)
    assert -1e-12 <= interval.low <= interval.value + 1e-12
    assert interval.value - 1e-12 <= interval.high <= 1.0 + 1e-12


@given(trials)
def test_wilson_mirrors_when_successes_and_failures_swap(case: tuple[int, int]) -> None:
    right, count = case
    interval, mirrored = wilson(right, count), wilson(count - right, count)
    assert interval.low == pytest.approx(1.0 - mirrored.high, abs=1e-12)


@given(trials)
def test_more_trials_at_the_same_share_narrow_the_interval(case: tuple[int, int]) -> None:
    right, count = case
    few, many = wilson(right, count), wilson(4 * right, 4 * count)
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(("right", "count"), [(0, 0), (2, 1), (-1, 3)])
def test_wilson_refuses_what_is_no_proportion(right: int, count: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        wilson(right, count)


@pytest.mark.parametrize(("count", "p_value"), ONE_SIDED.items())
def test_mcnemar_gives_the_exact_binomial_p(count: int, p_value: float) -> None:
    assert mcnemar([(True, False)] * count).p_value == pytest.approx(p_value, abs=1e-12)


def test_mcnemar_ignores_pairs_that_agree() -> None:
    discordant = [(True, False)] * 6
    agreeing = [(True, True)] * 9 + [(False, False)] * 4
    comparison = mcnemar(discordant + agreeing)
    assert comparison.p_value == mcnemar(discordant).p_value
    assert (comparison.num_pairs, comparison.both, comparison.neither) == (19, 9, 4)
    assert (comparison.first.num_successes, comparison.second.num_successes) == (15, 9)


def test_mcnemar_without_a_difference_is_certain_of_nothing() -> None:
    assert mcnemar([(True, True), (False, False)]).p_value == 1.0


@given(pairs)
def test_mcnemar_is_symmetric_and_counts_every_pair_once(outcomes: list[tuple[bool, bool]]) -> None:
    forward, backward = mcnemar(outcomes), mcnemar([(b, a) for a, b in outcomes])
    assert forward.p_value == pytest.approx(backward.p_value, rel=1e-12)
    assert (forward.only_first, forward.only_second) == (backward.only_second, backward.only_first)
    assert forward.both + forward.only_first + forward.only_second + forward.neither == len(outcomes)
    assert 0.0 < forward.p_value <= 1.0 + 1e-12


@given(pairs)
def test_mcnemar_does_not_depend_on_the_order_of_pairs(outcomes: list[tuple[bool, bool]]) -> None:
    assert mcnemar(outcomes) == mcnemar(sorted(outcomes))


def test_mcnemar_refuses_no_pairs() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        mcnemar([])


def test_paired_difference_gives_the_t_interval_of_a_known_sample() -> None:
    # Mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776445: half width 2.776445 * sqrt(2.5 / 5).
    result = paired_difference([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (result.num_pairs, result.mean) == (5, 3.0)
    assert result.high - result.mean == pytest.approx(2.776445 * math.sqrt(0.5), abs=1e-6)


def test_one_pair_has_an_unbounded_interval() -> None:
    result = paired_difference([0.5])
    assert (result.mean, result.low, result.high) == (0.5, -math.inf, math.inf)


@given(differences)
def test_paired_difference_is_centred_and_mirrors_with_the_sign(values: list[float]) -> None:
    forward, backward = paired_difference(values), paired_difference([-value for value in values])
    assert forward.low <= forward.mean <= forward.high
    assert (backward.low, backward.high) == (pytest.approx(-forward.high), pytest.approx(-forward.low))
