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


@dataclass(frozen=True)
class Share:
    """Which process of how many."""

    process_index: int = 0
    num_processes: int = 1


def share_of(count: int, share: Share, costs: list[int] | None = None) -> list[int]:
    """The places in [0, count) that one process takes: all places are taken once, and every process takes as many.

    Without costs every `num_processes`-th place. With them the sums are evened out: the costliest goes to the process
    with the least to do that still takes any (Graham 1969), so that none waits long for the others.

    Raises:
        ValueError: the places cannot be shared equally.
    """
    if count % share.num_processes:
        raise ValueError(f"{count} windows cannot be shared equally by {share.num_processes} processes")
    if costs is None:
        return list(range(share.process_index, count, share.num_processes))
    taken: list[list[int]] = [[] for _ in range(share.num_processes)]
    sums = [0] * share.num_processes
    for place in sorted(range(count), key=lambda place: (-costs[place], place)):
        open_ones = [process for process in range(share.num_processes) if len(taken[process]) < count // len(taken)]
        process = min(open_ones, key=lambda process: (sums[process], process))
        taken[process].append(place)
        sums[process] += costs[place]
    # Costliest first for every process: passes that run at the same time then cost about the same too.
    return taken[share.process_index]
