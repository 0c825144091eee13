"""How much of each source is read: what its share of the training tokens needs, and not the rest of a terabyte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctxext.recipe.data import DataBlock, LengthBlock, SourceBlock

# Where long documents are wanted and rare, reading stops here; what was found is then read several times.
_MOST_PASSES = 8


@dataclass(frozen=True)
class Demand:
    """What is still missing of one source; documents are taken whole until it is met.

    Attributes:
        tokens: to be read; None for all there are.
        long_tokens: of these, in documents of at least `long_from` tokens.
        most: tokens after which reading ends although long ones are missing.
    """

    tokens: int | None
    long_tokens: int = 0
    long_from: int = 0
    most: int = 0

    @property
    def met(self) -> bool:
        """Whether nothing more needs to be read."""
        return self.tokens is not None and ((self.tokens <= 0 and self.long_tokens <= 0) or self.most <= 0)

    def after(self, lengths: npt.NDArray[np.int64]) -> Demand:
        """What is missing when documents of these lengths were read."""
        if self.tokens is None:
            return self
        read, read_long = int(lengths.sum()), int(lengths[lengths >= self.long_from].sum())
        return Demand(self.tokens - read, self.long_tokens - read_long, self.long_from, self.most - read)

    def num_taken(self, lengths: npt.NDArray[np.int64]) -> int:
        """How many of these documents, from the first, are taken until the demand is met."""
        if self.tokens is None:
            return len(lengths)
        read = np.cumsum(lengths)
        read_long = np.cumsum(np.where(lengths >= self.long_from, lengths, 0))
        done = ((read >= self.tokens) & (read_long >= self.long_tokens)) | (read >= self.most)
        if self.met:
            return 0
        return int(np.argmax(done)) + 1 if done.any() else len(lengths)


def wanted_tokens(sources: Sequence[SourceBlock], num_tokens: int) -> list[int]:
    """How many of `num_tokens` each source gives, by its weight."""
    total_weight = sum(source.weight for source in sources)
    return [int(num_tokens * source.weight / total_weight) + 1 for source in sources]


def long_from_of(length: LengthBlock, window_tokens: int) -> int:
    """Tokens from which a document counts as long: as the recipe says, or half a window."""
    return length.long_from or -(-window_tokens // 2)


def demands_of(data: DataBlock, num_tokens: int | None, window_tokens: int) -> list[Demand]:
    """What each source must give for `num_tokens` of training; everything when None.

    A source whose long documents are to be taken more often is read on until it has enough of them; one whose documents
    may be too short for use is read on as well.
    """
    if num_tokens is None:
        return [Demand(None)] * len(data.sources)
    length = data.length
    long_from = long_from_of(length, window_tokens)
    demands = []
    for source, wanted in zip(data.sources, wanted_tokens(data.sources, num_tokens), strict=True):
        least = source.min_tokens or 0
        if length.long_share is not None:
            demand = Demand(wanted, round(wanted * length.long_share), max(long_from, least), _MOST_PASSES * wanted)
        elif length.upsample is not None:  # its natural share is known only when much was read
            demand = Demand(_MOST_PASSES * wanted, 0, 0, _MOST_PASSES * wanted)
        elif least:
            demand = Demand(wanted, wanted, least, _MOST_PASSES * wanted)
        else:
            demand = Demand(wanted, 0, 0, wanted)
        demands.append(demand)
    return demands
