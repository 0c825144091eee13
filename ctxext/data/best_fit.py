"""Best-fit decreasing: pieces of text into as few windows as possible without cutting any (Ding et al. 2024,
arXiv:2404.10830).

Each piece, longest first, goes into the fullest window that still has room. Done for all pieces of equal length and all
windows of equal room at once: time grows with the number of different lengths rather than with that of pieces.

    lengths [5, 3, 3, 2, 2], capacity 8  ->  windows {5, 3} {3, 2, 2}
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class _Room:
    """Windows by the room that they have left."""

    def __init__(self) -> None:
        self._windows: dict[int, list[Ints]] = {}
        self._sizes: list[int] = []

    def smallest_from(self, length: int) -> int | None:
        """The least room of at least `length` that some window has."""
        place = bisect_left(self._sizes, length)
        return self._sizes[place] if place < len(self._sizes) else None

    def put(self, room: int, windows: Ints) -> None:
        if room in self._windows:
            self._windows[room].append(windows)
        else:
            self._windows[room] = [windows]
            insort(self._sizes, room)

    def take(self, room: int, count: int) -> Ints:
        """At most `count` windows that have exactly `room`."""
        stack = self._windows[room]
        windows = stack.pop()
        if len(windows) > count:
            stack.append(windows[count:])
            windows = windows[:count]
        if not stack:
            del self._windows[room]
            del self._sizes[bisect_left(self._sizes, room)]
        return windows


def best_fit(lengths: Ints, capacity: int) -> tuple[Ints, int]:
    """The window of every piece, and the number of windows.

    Equal lengths take their places in the order given; at most one window ends up less than half full.

    Args:
        lengths: [P], each in [1, capacity].

    Raises:
        ValueError: a piece that fits into no window.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"pieces of {lengths.min()} to {lengths.max()} tokens do not fit into {capacity}")
    longest_first = np.argsort(-lengths, kind="stable")
    descending = lengths[longest_first]
    borders = [0, *(np.flatnonzero(np.diff(descending)) + 1).tolist(), len(lengths)]
    window_of = np.empty(len(lengths), dtype=np.int64)
    room, num_windows = _Room(), 0
    for begin, end in pairwise(borders):
        if begin == end:
            continue
        length, at = int(descending[begin]), begin
        while at < end:
            left = room.smallest_from(length)
            size = capacity if left is None else left
            # The window that a piece has just gone into has the least room of all: it is filled before the next one.
            each = size // length
            needed = -(-(end - at) // each)
            if left is None:
                windows = np.arange(num_windows, num_windows + needed)
                num_windows += needed
            else:
                windows = room.take(left, needed)
            count = min(len(windows) * each, end - at)
            window_of[longest_first[at : at + count]] = np.repeat(windows, each)[:count]
            whole, rest = divmod(count, each)
            if size - each * length and whole:
                room.put(size - each * length, windows[:whole])
            if rest:
                room.put(size - rest * length, windows[whole : whole + 1])
            at += count
    return window_of, num_windows
