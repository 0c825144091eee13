"""Which window comes when is a pure function: a permutation an epoch, and a cursor that never skips or repeats."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxext.data.order import Cursor, Share, share_of, window_order, windows_after

seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, epoch=st.integers(0, 50), num_windows=st.integers(1, 200))
def test_every_epoch_is_a_permutation(seed: int, epoch: int, num_windows: int) -> None:
    order = window_order(seed, epoch, num_windows)
    assert sorted(order) == list(range(num_windows))
    assert order == window_order(seed, epoch, num_windows)
    assert all(type(index) is int for index in order)


@given(seed=seeds, num_windows=st.integers(1, 20), steps=st.lists(st.integers(0, 30), max_size=8))
def test_slices_behind_a_moving_cursor_join_to_one_sequence(seed: int, num_windows: int, steps: list[int]) -> None:
    joined: list[tuple[int, int]] = []
    for count in steps:
        joined += windows_after(Cursor(seed, len(joined)), count, num_windows)
    assert joined == windows_after(Cursor(seed, 0), sum(steps), num_windows)


@given(seed=seeds, num_windows=st.integers(1, 20), num_epochs=st.integers(1, 4))
def test_every_window_comes_once_in_every_epoch(seed: int, num_windows: int, num_epochs: int) -> None:
    chosen = windows_after(Cursor(seed, 0), num_windows * num_epochs, num_windows)
    assert [epoch for epoch, _ in chosen] == [epoch for epoch in range(num_epochs) for _ in range(num_windows)]
    assert len(set(chosen)) == len(chosen)


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(window_order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_of_a_released_version_stays() -> None:
    # A resumed run reads on where another version of ctxext or numpy stopped.
    assert window_order(0, 0, 8) == [2, 4, 3, 6, 5, 0, 1, 7]
    assert window_order(0, 1, 8) == [1, 3, 7, 6, 0, 4, 2, 5]


def test_no_windows_cannot_be_ordered() -> None:
    with pytest.raises(ValueError, match="no windows"):
        windows_after(Cursor(0, 0), 1, 0)


@given(each=st.integers(1, 12), num_processes=st.integers(1, 8), costs=st.booleans(), seed=seeds)
def test_processes_share_all_windows_without_overlap(each: int, num_processes: int, costs: bool, seed: int) -> None:
    count = each * num_processes
    drawn = random.Random(seed).choices(range(1, 1000), k=count) if costs else None
    taken = [share_of(count, Share(index, num_processes), drawn) for index in range(num_processes)]
    assert sorted(place for places in taken for place in places) == list(range(count))
    assert all(len(places) == each for places in taken)


def test_without_costs_every_nth_window_is_taken() -> None:
    assert share_of(8, Share(1, 4)) == [1, 5]


def test_costs_are_evened_out() -> None:
    rng = random.Random(0)
    plain, even = [], []
    for _ in range(50):
        costs = [rng.choice((1, 10, 100)) * rng.randint(1, 9) for _ in range(32)]
        for worst, given_costs in ((plain, None), (even, costs)):
            sums = [sum(costs[place] for place in share_of(32, Share(index, 4), given_costs)) for index in range(4)]
            worst.append(max(sums) / (sum(sums) / 4))
    assert np.mean(plain) > 1.3
    assert np.mean(even) < 1.05


def test_windows_that_cannot_be_shared_equally_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be shared equally"):
        share_of(5, Share(0, 2))
