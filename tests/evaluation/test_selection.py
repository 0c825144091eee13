"""Fewer or other samples: the longest length is never lost, and every beginning of the order covers the grid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxext.errors import UsageError
from ctxext.evaluation.grid import GridRow, RelativeLength
from ctxext.evaluation.selection import (
    affordable,
    by_importance,
    describe_samples,
    limited,
    parse_depths,
    parse_lengths,
    with_grid,
)
from ctxext.evaluation.suite import Sample, Suite, load_suite, resolve_samples


def grid_samples(lengths: list[int], depths: list[float], samples: int) -> list[Sample]:
    suite = Suite(
        description="test", grid=[GridRow(length=length, depths=depths, samples=samples) for length in lengths]
    )
    return resolve_samples(suite, 1024, 4096)


def test_lengths_are_tokens_multiples_of_1024_or_shares() -> None:
    assert parse_lengths("2048, 16K,50%") == [2048, 16384, RelativeLength(target=0.5)]


@pytest.mark.parametrize("text", ["", "8", "-5", "2k5", "0%", "101%", "1.5K", "2048,", "nan%", "²"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--lengths"):
        parse_lengths(text)


def test_depths_are_numbers_or_how_many() -> None:
    assert parse_depths("0,0.5,1") == [0.0, 0.5, 1.0]
    assert parse_depths("1") == [1.0]
    assert parse_depths("5") == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert parse_depths("11")[1] == 0.1


@pytest.mark.parametrize("text", ["", "-1", "0,0", "0,2", "nan", "0,,1", "1.5", "5000"])
def test_what_are_no_depths_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--depths"):
        parse_depths(text)


def test_other_lengths_keep_depths_and_samples_and_move_the_controls_to_the_ends() -> None:
    suite = with_grid(load_suite("needle-grid"), lengths=[1024, 2048, 4096])
    assert [(row.length, len(row.depths), row.samples) for row in suite.grid] == [
        (1024, 11, 3),
        (2048, 11, 3),
        (4096, 11, 3),
    ]
    control = next(task for task in suite.members if task.cell_name == "no_needle")
    assert control.grid is not None
    assert [(row.length, row.depths, row.samples) for row in control.grid] == [(1024, [0.5], 4), (4096, [0.5], 4)]


def test_other_depths_and_samples_keep_the_lengths() -> None:
    suite = with_grid(load_suite("quick"), depths=[0.1, 0.9], num_samples=1)
    assert all(row.depths == [0.1, 0.9] and row.samples == 1 for row in suite.grid)
    assert [row.length for row in suite.grid] == [row.length for row in load_suite("quick").grid]


def test_the_longest_length_comes_first_and_every_length_before_a_second_depth() -> None:
    ranked = by_importance(grid_samples([512, 1024, 2048], [0.0, 0.5, 1.0], 2))
    assert [(s.cell.length_tokens, s.cell.depth) for s in ranked[:4]] == [
        (2048, 0.5),
        (512, 0.5),
        (1024, 0.5),
        (2048, 0.0),
    ]
    assert {s.index for s in ranked[:9]} == {0}


@given(
    per_task=st.integers(1, 40),
    lengths=st.lists(st.integers(64, 5000), min_size=1, max_size=5, unique=True),
    num_samples=st.integers(1, 3),
)
def test_a_limit_keeps_the_longest_length_and_the_order(per_task: int, lengths: list[int], num_samples: int) -> None:
    samples = grid_samples(lengths, [0.0, 0.25, 0.5, 0.75, 1.0], num_samples)
    kept = limited(samples, per_task)
    assert len(kept) == min(per_task, len(samples))
    assert max(lengths) in {sample.cell.length_tokens for sample in kept}
    assert kept == [sample for sample in samples if sample in set(kept)]


@given(budget=st.floats(1.0, 100.0), num_samples=st.integers(1, 3))
def test_what_is_affordable_stays_within_the_budget_with_the_longest_length(budget: float, num_samples: int) -> None:
    samples = grid_samples([512, 1024, 2048], [0.0, 0.5, 1.0], num_samples)

    def seconds(sample: Sample) -> float:
        return sample.cell.length_tokens / 1024

    if budget < 2.0:
        with pytest.raises(UsageError, match="--max-minutes"):
            affordable(samples, seconds, budget)
        return
    kept = affordable(samples, seconds, budget)
    assert sum(map(seconds, kept)) <= budget
    assert 2048 in {sample.cell.length_tokens for sample in kept}
    rest = [sample for sample in by_importance(samples) if sample not in set(kept)]
    assert not rest or sum(map(seconds, kept)) + seconds(rest[0]) > budget


def test_every_task_keeps_its_longest_length_within_the_budget() -> None:
    samples = resolve_samples(load_suite("needle-grid"), 2048, 2048)
    kept = affordable(samples, lambda sample: 1.0, 3.0)
    assert {(s.cell.task, s.cell.length_tokens) for s in kept} >= {("needle", 2032), ("no_needle", 2032)}


def test_samples_are_described_by_length() -> None:
    assert describe_samples(grid_samples([512, 1024], [0.5], 2)) == (
        "4 samples at 512 (2) and 1,024 (2) tokens, 3,072 prompt tokens"
    )
