"""Skip-wise positions ascend from zero, stay below the target and reach all of it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxext.data.positions import (
    consecutive_positions,
    restarting_positions,
    shifted_positions,
    skip_wise_positions,
)
from ctxext.recipe.data import WindowsBlock


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Cuts, window length and target length that belong together."""
    length = draw(st.integers(2, 300))
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), min_size=1, max_size=6)))
    return cuts, length, length + draw(st.integers(0, 20_000))


@given(window=windows(), seed=st.integers(0, 2**32))
def test_positions_ascend_from_zero_and_jump_at_cuts_alone(window: tuple[list[int], int, int], seed: int) -> None:
    cuts, length, target = window
    positions = skip_wise_positions(cuts, length, target, random.Random(seed))
    assert len(positions) == length
    assert positions[: cuts[0]] == list(range(cuts[0]))
    assert positions[-1] < target
    steps = np.diff(positions)
    assert (steps >= 1).all()
    assert set(np.flatnonzero(steps != 1) + 1) <= set(cuts)
    assert positions == skip_wise_positions(cuts, length, target, random.Random(seed))


@given(window=windows())
def test_a_window_as_long_as_the_target_has_no_gaps(window: tuple[list[int], int, int]) -> None:
    cuts, length, _ = window
    assert skip_wise_positions(cuts, length, length, random.Random(0)) == consecutive_positions(length)


@pytest.mark.parametrize("num_chunks", [2, 3, 5])
def test_the_whole_target_range_is_covered(num_chunks: int) -> None:
    length, target = 64, 1024
    cuts = [length * chunk // num_chunks for chunk in range(1, num_chunks)]
    rng = random.Random(0)
    drawn = [skip_wise_positions(cuts, length, target, rng) for _ in range(4000)]
    assert set(np.concatenate(drawn)) == set(range(target))
    # The gaps together are uniform over [0, target - length]: mean, both ends and deciles of the last position.
    skips = np.array([positions[-1] - (length - 1) for positions in drawn])
    assert skips.min() == 0
    assert skips.max() == target - length
    counts, _ = np.histogram(skips, bins=10, range=(0, target - length))
    assert (abs(counts - 400) < 5 * np.sqrt(400)).all()


def test_gaps_share_the_skip_without_a_favourite() -> None:
    rng = random.Random(0)
    gaps = np.array([np.diff(skip_wise_positions([16, 32, 48], 64, 4096, rng))[[15, 31, 47]] for _ in range(4000)])
    means = gaps.mean(axis=0)
    assert (abs(means - means.mean()) < 0.08 * means.mean()).all()


@pytest.mark.parametrize("cuts", [[0], [10], [3, 3], [5, 2], [-1], [1, 11]])
def test_impossible_cuts_are_refused(cuts: list[int]) -> None:
    with pytest.raises(ValueError, match="not ascending"):
        skip_wise_positions(cuts, 10, 100, random.Random(0))


def test_a_window_above_the_target_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        skip_wise_positions([5], 10, 9, random.Random(0))


@pytest.mark.parametrize("num_chunks", [3, 4])
def test_full_range_windows_end_at_the_target_and_reach_all_of_it(num_chunks: int) -> None:
    length, target = 64, 512
    rng = random.Random(0)
    seen: set[int] = set()
    for _ in range(4000):
        cuts = sorted(rng.sample(range(1, length), num_chunks - 1))
        positions = skip_wise_positions(cuts, length, target, rng, to_the_end=True)
        assert positions[-1] == target - 1
        seen |= set(positions)
    assert seen == set(range(target))


def test_full_range_with_two_chunks_would_leave_the_middle_out_and_is_refused() -> None:
    length, target = 64, 512
    rng = random.Random(0)
    seen = {
        position
        for _ in range(2000)
        for position in skip_wise_positions([rng.randrange(1, length)], length, target, rng, to_the_end=True)
    }
    assert not seen & set(range(length, target - length))
    with pytest.raises(ValueError, match="never shows the middle"):
        WindowsBlock(mode="skip-wise", length=length, skips="full-range")


@given(starts=st.sets(st.integers(0, 49), max_size=8))
def test_positions_restart_where_documents_begin(starts: set[int]) -> None:
    positions = restarting_positions(sorted(starts), 50)
    assert [index for index, position in enumerate(positions) if position == 0] == sorted({0, *starts})
    assert all(b in (0, a + 1) for a, b in itertools.pairwise(positions))
    assert len(positions) == 50


def test_random_shifts_are_consecutive_and_reach_the_whole_range() -> None:
    rng = random.Random(0)
    drawn = [shifted_positions(16, 64, rng) for _ in range(2000)]
    assert all(np.diff(positions).tolist() == [1] * 15 for positions in drawn)
    assert {positions[0] for positions in drawn} == set(range(49))
    with pytest.raises(ValueError, match="does not fit"):
        shifted_positions(65, 64, rng)
