"""Needle-effective length of models whose reach is known."""

from __future__ import annotations

import pytest
from known_answers import blind, grid, hole, limited, oracle

from ctxext.errors import UsageError
from ctxext.evaluation.effective_length import (
    RULER_TASKS,
    EffectiveLength,
    bound_feasibility,
    effective_length,
    holes,
    independent_samples,
    needle_effective_lengths,
    ruler_effective_length,
    scores_by_length,
)
from ctxext.evaluation.statistics import mean_score
from ctxext.evaluation.store import SampleResult


def lengths_of(samples: list[SampleResult]) -> dict[tuple[str, str], EffectiveLength]:
    return {(length.definition, length.by): length for length in needle_effective_lengths(samples)}


def test_an_oracle_reaches_the_longest_tested_length_and_no_further() -> None:
    found = lengths_of(grid(oracle))
    assert len(found) == 4
    for length in found.values():
        assert (length.tokens, length.is_open) == (4096, True)
        assert length.text() == ">= 4,096 tokens (longest tested)"


def test_a_blind_model_is_below_the_shortest_tested_length_by_every_definition() -> None:
    for length in lengths_of(grid(blind)).values():
        assert length.tokens is None
        assert length.text() == "below 1,024 tokens (shortest tested)"


def test_a_limited_model_stops_at_its_limit_and_a_later_recovery_does_not_count() -> None:
    for length in lengths_of(grid(limited(2048))).values():
        assert (length.tokens, length.first_failed_tokens) == (2048, 4096)
        assert length.text() == "2,048 tokens (4,096 fails)"
    recovering = grid(lambda s: float(s.length_tokens != 2048))
    assert {length.tokens for length in lengths_of(recovering).values()} == {1024}


def test_few_samples_pass_by_estimate_only() -> None:
    found = lengths_of(grid(oracle, depths=[0.5], per_cell=22))
    assert found["absolute", "estimate"].tokens == 4096
    assert found["absolute", "bound"].tokens is None
    assert lengths_of(grid(oracle, depths=[0.5], per_cell=23))["absolute", "bound"].tokens == 4096


def test_samples_of_a_few_shared_haystacks_do_not_reach_the_bound() -> None:
    assert lengths_of(grid(oracle, shared=True))["absolute", "bound"].tokens is None


def test_a_weak_model_has_a_relative_length_without_an_absolute_one() -> None:
    weak = grid(lambda s: float(s.index < 6), per_cell=10)
    found = lengths_of(weak)
    assert found["absolute", "estimate"].tokens is None
    assert found["relative", "estimate"].tokens == 4096
    assert found["relative", "estimate"].threshold == pytest.approx(0.85 * 0.6)


def test_the_relative_bound_counts_the_uncertainty_of_both_scores() -> None:
    def share(right: int, count: int) -> object:
        return mean_score([1.0] * right + [0.0] * (count - right), range(count))

    few = effective_length({1: share(9, 10), 2: share(9, 10)}, "relative", "bound")  # type: ignore[dict-item]
    many = effective_length({1: share(900, 1000), 2: share(900, 1000)}, "relative", "bound")  # type: ignore[dict-item]
    assert (few.tokens, many.tokens) == (1, 2)


def test_a_hole_that_the_average_hides_is_found() -> None:
    depths = [number / 10 for number in range(11)]
    samples = grid(hole, depths=depths, per_cell=4)
    assert lengths_of(samples)["absolute", "estimate"].tokens == 4096
    (found,) = holes(samples, 4096)
    assert (found.depth, found.score.value) == (0.5, 0.0)
    assert not holes(grid(oracle, depths=depths, per_cell=4), 4096)
    assert not holes(grid(hole, [1024], depths=depths, per_cell=1), 1024)  # one miss proves no hole


def test_unscored_lengths_are_not_tested_lengths() -> None:
    samples = [
        s if s.length_tokens < 4096 else SampleResult(**{**vars(s), "status": "out_of_memory"}) for s in grid(oracle)
    ]
    assert list(scores_by_length(samples)) == [1024, 2048]
    assert lengths_of(samples)["absolute", "estimate"].text() == ">= 2,048 tokens (longest tested)"
    assert needle_effective_lengths([]) == []
    with pytest.raises(ValueError, match="one task"):
        scores_by_length([*grid(oracle), *grid(oracle, task="other")])


def test_what_a_suite_can_show_is_said_before_the_run() -> None:
    assert "Every length has enough" in bound_feasibility({1024: 23, 2048: 40})
    short = bound_feasibility({1024: 30, 2048: 8, 4096: 40})
    assert "cannot exceed 1,024 tokens" in short
    assert "needs 23 independent samples without a miss, 36 with one" in short
    assert "8 at 2,048 tokens" in short
    assert "cannot be given at all" in bound_feasibility({1024: 3})
    shared = independent_samples((s.length_tokens, s.haystack_sha256) for s in grid(oracle, shared=True))
    assert shared == {1024: 5, 2048: 5, 4096: 5}


def test_rulers_effective_length_is_the_mean_of_its_13_tasks() -> None:
    assert len(set(RULER_TASKS)) == 13
    good = dict.fromkeys(RULER_TASKS, 0.9)
    weak = {**good, "cwe": 0.0}  # 12 x 0.9 / 13 = 0.831
    result = ruler_effective_length({4096: good, 8192: weak, 16384: good})
    assert (result.tokens, result.first_failed_tokens) == (4096, 8192)
    exact = ruler_effective_length({4096: dict.fromkeys(RULER_TASKS, 0.856)})
    assert exact.tokens is None  # it must be exceeded
    with pytest.raises(UsageError, match=r"13 tasks.*no score for qa_1, qa_2"):
        ruler_effective_length({4096: dict.fromkeys(RULER_TASKS[:-2], 1.0)})
