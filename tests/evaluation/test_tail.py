"""The tail number of models that read the end, the beginning, or both."""

from __future__ import annotations

from dataclasses import replace

import pytest
from known_answers import blind, grid, hole, oracle, tail_blind

from ctxext.evaluation.store import SampleResult
from ctxext.evaluation.tail import NoTail, TailNumber, tail_number


def tail(samples: list[SampleResult]) -> TailNumber:
    found = tail_number(samples)
    assert isinstance(found, TailNumber), found
    return found


def test_an_oracle_and_a_blind_model_read_both_ends_alike_within_an_honest_interval() -> None:
    for answers in (oracle, blind, hole):
        found = tail(grid(answers, shared=True, per_cell=10))
        assert (found.difference.value, found.num_pairs, found.num_haystacks) == (0.0, 10, 10)
        # Ten pairs that agree do not prove equality: a bootstrap would give an interval of no width.
        assert found.difference.low == pytest.approx(-0.2775, abs=1e-4)
        assert found.difference.high == pytest.approx(0.2775, abs=1e-4)


def test_a_tail_blind_model_is_caught_although_its_average_is_good() -> None:
    found = tail(grid(tail_blind, shared=True, per_cell=10))
    assert (found.difference.value, found.length_tokens) == (-1.0, 4096)
    assert found.difference.high < -0.5
    assert "-1.00" in found.text()
    assert "10 needles at both ends of 10 haystacks" in found.text()


def test_one_haystack_decides_nothing() -> None:
    one = [replace(s, haystack_sha256="one") for s in grid(tail_blind, shared=True, per_cell=10)]
    found = tail(one)
    assert (found.difference.value, found.num_pairs, found.num_haystacks) == (-1.0, 10, 1)
    assert found.difference.high > -0.2


def test_only_the_longest_length_counts() -> None:
    samples = grid(tail_blind, [1024], shared=True) + grid(oracle, [2048], shared=True)
    assert (tail(samples).length_tokens, tail(samples).difference.value) == (2048, 0.0)


def test_several_needles_of_an_end_are_averaged() -> None:
    samples = grid(lambda s: float(s.depth != 0.99), [4096], depths=[0.02, 0.08, 0.91, 0.99], shared=True)
    found = tail(samples)
    assert (found.num_pairs, found.difference.first.value, found.difference.value) == (5, 0.5, -0.5)


def test_ends_of_different_haystacks_are_compared_unpaired_and_said_so() -> None:
    found = tail(grid(tail_blind, per_cell=10))
    assert (found.num_pairs, found.difference.value) == (0, -1.0)
    assert "not paired, 10 samples against 10" in found.text()


def test_positions_decide_not_depths() -> None:
    refused = tail_number(grid(oracle, [4096], depths=[0.1, 0.5, 0.89]))
    assert isinstance(refused, NoTail)
    assert "first and last tenth" in refused.reason
    assert "depths 0.05 and 0.95" in refused.reason


def test_a_longest_length_without_scores_is_not_replaced_by_a_shorter_one() -> None:
    samples = [s if s.length_tokens < 4096 else replace(s, status="out_of_memory") for s in grid(oracle, shared=True)]
    refused = tail_number(samples)
    assert isinstance(refused, NoTail)
    assert "no sample has a score at 4,096 tokens" in refused.reason
    assert isinstance(tail_number([]), NoTail)


def test_tasks_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="one task"):
        tail_number([*grid(oracle), *grid(oracle, task="other")])
