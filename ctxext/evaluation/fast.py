"""Guesses at how a text goes on, for greedy decoding to verify several tokens in one pass.

Answers about a text repeat parts of it, and the answers to questions about one text resemble each other: what followed
the last tokens where they stood before is a good guess, and costs no model (prompt lookup). A wrong guess changes
nothing, since every token is compared with the one that greedy decoding takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# On a CPU a pass of six tokens costs as much as 1.6 of one, of ten as much as two.
MOST_GUESSED = 5
# A single token that stood somewhere before says nothing about the next one.
_FEWEST_ALIKE = 2
_MOST_ALIKE = 16


class Lookup:
    """Continues a text from its own earlier parts.

    Args:
        num_tokens: room for so many tokens; more are taken at the price of a copy.
    """

    def __init__(self, num_tokens: int) -> None:
        self._ids: NDArray[np.int64] = np.empty(max(num_tokens, 1), dtype=np.int64)
        self._size = 0

    def add(self, ids: Sequence[int]) -> None:
        """Append what was read or written."""
        end = self._size + len(ids)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(end, dtype=np.int64)])
        self._ids[self._size : end] = ids
        self._size = end

    def guess(self, most: int = MOST_GUESSED) -> list[int]:
        """What followed the last place where the text read as it ends; the longest likeness decides."""
        text = self._ids[: self._size]
        if most < 1 or len(text) <= _FEWEST_ALIKE:
            return []
        ends = np.flatnonzero(text[:-1] == text[-1])
        alike = 1
        while alike < _MOST_ALIKE:
            longer = ends[ends >= alike]
            longer = longer[text[longer - alike] == text[-1 - alike]]
            if not len(longer):
                break
            ends, alike = longer, alike + 1
        if alike < _FEWEST_ALIKE or not len(ends):
            return []
        start = int(ends[-1]) + 1
        found: list[int] = text[start : start + most].tolist()
        return found
