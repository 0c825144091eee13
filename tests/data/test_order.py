"""Which window comes when is a pure function: a permutation an epoch, and a cursor that never skips or repeats."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxext.data.order import Cursor, window_order, windows_after

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
