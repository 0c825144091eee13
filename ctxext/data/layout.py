"""Which tokens stand in which training window: pure, from the lengths of documents alone.

    concatenate   pieces one behind the other, cut where a window ends:    |aaaa bb|bbb cccc|
    best-fit      no piece that fits is cut, windows are topped up:        |aaaa cc|bbbbb --|

Nothing is lost silently: the ledger says how many tokens came in, how many stand in windows, and why each of the others
does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ctxext.data.best_fit import best_fit
from ctxext.files import sha256_bytes

Ints = npt.NDArray[np.int64]
# (document, begin, latest end) -> where to cut a piece that begins at `begin`.
FindCut = Callable[[int, int, int], int]

_BEHIND_LAST_WINDOW = "behind the last whole window"
_HALF_EMPTY = "in a last window that is less than half full"


class PieceTable(Protocol):
    """Token ranges of documents, in the order of training; a selection is one."""

    @property
    def documents(self) -> Ints:
        """[K] document of every piece."""

    @property
    def begins(self) -> Ints:
        """[K] first token."""

    @property
    def ends(self) -> Ints:
        """[K] the token behind the last."""


@dataclass(frozen=True)
class Pieces:
    """A plain `PieceTable`."""

    documents: Ints
    begins: Ints
    ends: Ints

    @staticmethod
    def whole(lengths: npt.NDArray[np.integer]) -> Pieces:
        """All documents of these lengths, uncut and in order."""
        ends = np.asarray(lengths, dtype=np.int64)
        return Pieces(np.arange(len(ends)), np.zeros_like(ends), ends)


def pieces_sha256(pieces: PieceTable) -> str:
    """Identifies what is read, in which order."""
    columns = (pieces.documents, pieces.begins, pieces.ends)
    return sha256_bytes(b"".join(np.ascontiguousarray(column, dtype="<i8").tobytes() for column in columns))


@dataclass(frozen=True)
class Ledger:
    """Where tokens went: `tokens_in` = `tokens_kept` + all of `dropped`.

    Attributes:
        dropped: tokens by reason.
        num_padding: tokens added at the ends of windows, never learned.
        num_cut: documents that were cut although nobody asked for it (longer than a window, or at a window's end).
    """

    tokens_in: int
    tokens_kept: int
    dropped: dict[str, int]
    num_padding: int
    num_cut: int

    def sentence(self) -> str:
        """For people: '1,000 tokens in = 960 in windows + 40 dropped (40 behind the last whole window)'."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        lost = sum(self.dropped.values())
        text = f"{self.tokens_in:,} tokens in = {self.tokens_kept:,} in windows + {lost:,} dropped"
        text += f" ({reasons})" if reasons else ""
        return f"{text}; {self.num_padding:,} of padding added" if self.num_padding else text


@dataclass(frozen=True)
class Layout:
    """Which tokens stand in which window.

    Attributes:
        length: tokens of a window.
        first_run: [W + 1] where the runs of a window begin in the arrays below.
        documents, begins, ends: [R] token ranges, in the order in which they stand in their windows.
        fresh: [R] whether a run begins a document for the model: false for the rest of one cut by a window's end.
    """

    length: int
    first_run: Ints
    documents: Ints
    begins: Ints
    ends: Ints
    fresh: npt.NDArray[np.bool_]
    ledger: Ledger

    @property
    def num_windows(self) -> int:
        """Windows of exactly `length` tokens (padding included)."""
        return len(self.first_run) - 1

    def runs(self, window: int) -> slice:
        """The runs of one window."""
        return slice(int(self.first_run[window]), int(self.first_run[window + 1]))


def concatenate(pieces: PieceTable, length: int) -> Layout:
    """All pieces one behind the other, cut into windows; what does not fill a window is dropped."""
    lengths = pieces.ends - pieces.begins
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    num_windows = int(bounds[-1]) // length
    used = num_windows * length
    window_starts = np.arange(num_windows + 1) * length
    piece_starts = bounds[:-1][(lengths > 0) & (bounds[:-1] < used)]
    # Both are sorted: a stable sort merges them in linear time, and a piece's start beats the window's at one place.
    starts = np.concatenate([piece_starts, window_starts[:-1]])
    starts.sort(kind="stable")
    starts = starts[np.concatenate([[True], np.diff(starts) > 0])] if len(starts) else starts
    stops = np.append(starts[1:], used) if len(starts) else starts
    piece = np.searchsorted(bounds, starts, side="right") - 1
    inside = starts - bounds[piece]
    begins = pieces.begins[piece] + inside
    rest = int(bounds[-1]) - used
    return Layout(
        length=length,
        first_run=np.searchsorted(starts, window_starts),
        documents=pieces.documents[piece],
        begins=begins,
        ends=begins + (stops - starts),
        fresh=inside == 0,
        ledger=Ledger(
            int(bounds[-1]),
            used,
            {_BEHIND_LAST_WINDOW: rest} if rest else {},
            num_padding=0,
            num_cut=len(np.unique(piece[inside > 0])),
        ),
    )


def pack_best_fit(pieces: PieceTable, length: int, seed: int, find_cut: FindCut) -> Layout:
    """Whole pieces into as few windows as possible; longer ones are cut first, where `find_cut` says.

    The order inside a window is drawn: best-fit itself would put the longest piece first, always. Documents that are
    read several times are packed pass by pass, so that no window holds one twice, which would teach copying. A window
    that is less than half full (there is at most one a pass) is dropped.
    """
    cut = _cut_to(pieces, length, find_cut)
    lengths = cut.ends - cut.begins
    window_of, num_windows = _pack_passes(cut, lengths, length)
    filled = np.bincount(window_of, weights=lengths, minlength=num_windows).astype(np.int64)
    kept = 2 * filled >= length
    number = np.cumsum(kept) - 1
    in_kept = np.flatnonzero(kept[window_of])
    places = np.random.default_rng([seed, 3]).random(len(in_kept))
    order = in_kept[np.lexsort((places, number[window_of[in_kept]]))]
    tokens_in, tokens_kept = int(lengths.sum()), int(filled[kept].sum())
    return Layout(
        length=length,
        first_run=np.searchsorted(number[window_of[order]], np.arange(int(kept.sum()) + 1)),
        documents=cut.documents[order],
        begins=cut.begins[order],
        ends=cut.ends[order],
        fresh=np.ones(len(order), dtype=np.bool_),
        ledger=Ledger(
            tokens_in,
            tokens_kept,
            {_HALF_EMPTY: tokens_in - tokens_kept} if tokens_in > tokens_kept else {},
            num_padding=int(kept.sum()) * length - tokens_kept,
            num_cut=int((pieces.ends - pieces.begins > length).sum()),
        ),
    )


def _pack_passes(pieces: Pieces, lengths: Ints, length: int) -> tuple[Ints, int]:
    """The window of every piece, first readings of all documents before second ones; and the number of windows."""
    reading = _reading_of(pieces)
    window_of, num_windows = np.empty(len(lengths), dtype=np.int64), 0
    for number in range(int(reading.max(initial=0)) + 1):
        members = np.flatnonzero(reading == number)
        places, count = best_fit(lengths[members], length)
        window_of[members] = places + num_windows
        num_windows += count
    return window_of, num_windows


def _reading_of(pieces: Pieces) -> Ints:
    """For every piece, how often the same one stands before it."""
    order = np.lexsort((pieces.begins, pieces.documents))
    documents, begins = pieces.documents[order], pieces.begins[order]
    is_new = np.concatenate([[True], (np.diff(documents) != 0) | (np.diff(begins) != 0)])[: len(order)]
    first_of_run = np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))
    reading = np.empty(len(order), dtype=np.int64)
    reading[order] = np.arange(len(order)) - first_of_run
    return reading


def _cut_to(pieces: PieceTable, length: int, find_cut: FindCut) -> Pieces:
    """Pieces of at most `length` tokens, none of them empty."""
    lengths = pieces.ends - pieces.begins
    fits = (lengths > 0) & (lengths <= length)
    documents, begins, ends = [pieces.documents[fits]], [pieces.begins[fits]], [pieces.ends[fits]]
    for index in np.flatnonzero(lengths > length):
        document, begin, end = (int(column[index]) for column in (pieces.documents, pieces.begins, pieces.ends))
        cuts = [begin]
        while end - cuts[-1] > length:
            cuts.append(find_cut(document, cuts[-1], cuts[-1] + length))
        documents.append(np.full(len(cuts), document))
        begins.append(np.array(cuts))
        ends.append(np.array([*cuts[1:], end]))
    return Pieces(np.concatenate(documents), np.concatenate(begins), np.concatenate(ends))
