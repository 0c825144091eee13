"""Samples that share a haystack count for less, and never for more, than independent ones."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxext.evaluation.statistics import (
    clustered_wilson,
    compare_paired,
    effective_samples,
    holm,
    mcnemar,
    mean_score,
    paired_difference,
    paired_share_difference,
    samples_for_lower_bound,
    share_difference,
    sign_flip,
    wilson,
)

outcomes = st.lists(st.booleans(), min_size=1, max_size=40)
clustered = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=40)


@given(outcomes)
@settings(max_examples=30)
def test_a_cluster_for_every_sample_is_plain_wilson(right: list[bool]) -> None:
    assert clustered_wilson(right, range(len(right))) == wilson(sum(right), len(right))
    mean = mean_score([float(value) for value in right], range(len(right)))
    plain = wilson(sum(right), len(right))
    assert (mean.low, mean.high) == (pytest.approx(plain.low, abs=1e-12), pytest.approx(plain.high, abs=1e-12))


@pytest.mark.parametrize("right", [True, False])
def test_when_all_agree_each_cluster_counts_once(right: bool) -> None:
    share = clustered_wilson([right] * 20, [index % 4 for index in range(20)])
    alone = wilson(4 * right, 4)
    assert (share.num_clusters, share.num_effective) == (4, 4.0)
    assert (share.low, share.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert "of 20 in 4 clusters" in share.text()


def test_one_cluster_is_one_sample_however_many_answers_it_has() -> None:
    for right in ([True] * 50, [True, False] * 25):
        assert effective_samples([float(value) for value in right], ["only"] * 50) == (1, 1.0)


def test_clusters_whose_samples_agree_count_once_each() -> None:
    # Four haystacks of five, two all right and two all wrong: as telling as four answers, not as twenty.
    right = [True] * 10 + [False] * 10
    share = clustered_wilson(right, [index // 5 for index in range(20)])
    assert share.num_effective == pytest.approx(4.0)
    assert (share.low, share.high) == (pytest.approx(wilson(2, 4).low), pytest.approx(wilson(2, 4).high))


def test_clusters_that_differ_only_inside_cost_nothing() -> None:
    # Every haystack has one right and one wrong answer: variance between clusters is 0, but no bonus is given for it.
    share = clustered_wilson([True, False] * 10, [index // 2 for index in range(20)])
    assert share.num_effective == 20.0
    assert (share.low, share.high) == (pytest.approx(wilson(10, 20).low), pytest.approx(wilson(10, 20).high))


@given(clustered)
@settings(max_examples=60)
def test_the_effective_number_lies_between_one_and_the_number_of_samples(cases: list[tuple[bool, int]]) -> None:
    right, clusters = [case[0] for case in cases], [case[1] for case in cases]
    num_clusters, effective = effective_samples([float(value) for value in right], clusters)
    assert num_clusters == len(set(clusters))
    assert 1.0 - 1e-9 <= effective <= len(cases) + 1e-9
    share, plain = clustered_wilson(right, clusters), wilson(sum(right), len(right))
    assert share.high - share.low >= plain.high - plain.low - 1e-9
    assert share.low - 1e-9 <= share.value <= share.high + 1e-9


def test_partial_scores_get_the_wilson_interval_of_their_mean() -> None:
    score = mean_score([0.5, 0.75, 0.25, 0.5], range(4))
    assert (score.value, score.num_effective) == (0.5, 4.0)
    assert (score.low, score.high) == (pytest.approx(wilson(2, 4).low), pytest.approx(wilson(2, 4).high))
    with pytest.raises(ValueError, match="outside 0 to 1"):
        mean_score([1.5], [0])


def test_as_many_cluster_names_as_samples_are_needed() -> None:
    with pytest.raises(ValueError, match="2 scores with 1 cluster"):
        effective_samples([0.0, 1.0], ["a"])
    with pytest.raises(ValueError, match="0 scores"):
        clustered_wilson([], [])


def brute_force(differences: list[int]) -> float:
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(abs(total) >= abs(sum(differences)) for total in sums) / len(sums)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
@settings(max_examples=40)
def test_sign_flip_equals_the_enumeration_of_all_patterns(differences: list[int]) -> None:
    assert sign_flip(differences) == pytest.approx(brute_force(differences), abs=1e-12)


def test_sign_flip_over_single_samples_is_mcnemar() -> None:
    for only_first, only_second in ((6, 0), (9, 2), (3, 3), (20, 7)):
        pairs = [(True, False)] * only_first + [(False, True)] * only_second
        flipped = sign_flip([1] * only_first + [-1] * only_second)
        assert flipped == pytest.approx(mcnemar(pairs).p_value, abs=1e-12)


def test_too_many_different_sums_are_sampled_and_stay_reproducible() -> None:
    differences = [3**power for power in range(20)]  # every pattern has a sum of its own
    assert sign_flip(differences) == sign_flip(differences)
    assert sign_flip(differences) < 0.001
    assert sign_flip([*differences[:-1], 0]) > 0


def test_twenty_one_sided_prompts_of_two_haystacks_decide_nothing() -> None:
    pairs = [(True, False)] * 20
    comparison = compare_paired(pairs, [index % 2 for index in range(20)])
    assert (comparison.test, comparison.p_value) == ("sign flip", 0.5)
    assert comparison.better is None
    assert not comparison.decidable
    assert comparison.verdict("yarn", "base") == (
        "not decided (p = 0.5): only 2 clusters differ, and fewer than 6 can show nothing"
    )
    assert mcnemar(pairs).better == "first"


def test_six_one_sided_haystacks_decide() -> None:
    comparison = compare_paired([(False, True)] * 12, [index // 2 for index in range(12)])
    assert comparison.p_value == pytest.approx(2 * 0.5**6)
    assert comparison.verdict("yarn", "base") == "base is better than yarn (p = 0.0312)"
    assert (comparison.first.num_clusters, comparison.num_units) == (6, 6)


def test_every_verdict_has_its_words() -> None:
    assert mcnemar([(True, True)]).verdict("a", "b") == "a and b answer every prompt alike"
    assert mcnemar([(True, False)] * 4 + [(False, True)] * 4).verdict("a", "b") == "no difference shown (p = 1)"
    assert "only 1 prompt differs" in mcnemar([(True, False)]).verdict("a", "b")


def test_holm_gives_the_textbook_adjustment() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_paired_difference_of_shares_is_newcombes_published_interval() -> None:
    # Newcombe 1998 (Stat. Med. 17:2635), the fourfold table 36, 12, 2, 0 by method 10: 0.0569 to 0.3404.
    pairs = [(1.0, 1.0)] * 36 + [(1.0, 0.0)] * 12 + [(0.0, 1.0)] * 2
    difference = paired_share_difference(pairs, range(50))
    assert difference.value == pytest.approx(0.2)
    assert (difference.low, difference.high) == (pytest.approx(0.0569, abs=5e-5), pytest.approx(0.3404, abs=5e-5))


def test_the_difference_of_independent_shares_is_newcombes_published_interval() -> None:
    # Newcombe 1998 (Stat. Med. 17:873), 56 of 70 against 48 of 80 by method 10: 0.0524 to 0.3339.
    first = mean_score([1.0] * 56 + [0.0] * 14, range(70))
    second = mean_score([1.0] * 48 + [0.0] * 32, range(80))
    difference = share_difference(first, second)
    assert (difference.low, difference.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_the_bound_of_0_856_needs_23_samples_without_a_miss_and_36_with_one() -> None:
    assert (samples_for_lower_bound(0.856), samples_for_lower_bound(0.856, 1)) == (23, 36)
    for misses, count in ((0, 23), (1, 36), (2, samples_for_lower_bound(0.856, 2))):
        assert wilson(count - misses, count).low > 0.856
        assert wilson(count - 1 - misses, count - 1).low <= 0.856
    with pytest.raises(ValueError, match="lower bound above 1"):
        samples_for_lower_bound(1.0)


def test_differences_of_one_cluster_are_averaged_before_the_t_interval() -> None:
    plain = paired_difference([1.0, 3.0, 5.0])
    repeated = paired_difference([1.0, 1.0, 3.0, 3.0, 5.0, 5.0], ["a", "a", "b", "b", "c", "c"])
    assert (repeated.low, repeated.high) == (plain.low, plain.high)
    assert (plain.num_clusters, repeated.num_pairs, repeated.num_clusters) == (None, 6, 3)
