"""Which window when: a pure function of seed and count, so that a resumed run reads exactly what it would have read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cursor:
    """How far training has read: `num_consumed` windows over all processes since the start."""

    seed: int
    num_consumed: int


def window_order(seed: int, epoch: int, num_windows: int) -> list[int]:
    """The permutation of windows in one epoch."""
    return [int(index) for index in np.random.default_rng([seed, epoch]).permutation(num_windows)]


def windows_after(cursor: Cursor, count: int, num_windows: int) -> list[tuple[int, int]]:
    """The next `count` windows behind `cursor` as (epoch, window).

    Raises:
        ValueError: no windows.
    """
    if num_windows < 1:
        raise ValueError("no windows to order")
    chosen: list[tuple[int, int]] = []
    orders: dict[int, list[int]] = {}
    for number in range(cursor.num_consumed, cursor.num_consumed + count):
        epoch, place = divmod(number, num_windows)
        if epoch not in orders:
            orders[epoch] = window_order(cursor.seed, epoch, num_windows)
        chosen.append((epoch, orders[epoch][place]))
    return chosen
