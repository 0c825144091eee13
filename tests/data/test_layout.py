"""Layouts account for every token: windows are full, nothing that fits is cut, and what is dropped says why."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxext.data.best_fit import best_fit
from ctxext.data.layout import Layout, Pieces, concatenate, pack_best_fit

SEEDS = st.integers(0, 2**32 - 1)


def cut_anywhere(document: int, begin: int, limit: int) -> int:
    """A cut in the last eighth, as sentence ends give it: a pure function of its arguments."""
    return random.Random(f"{document}/{begin}").randint(limit - (limit - begin) // 8, limit)


@st.composite
def selections(draw: st.DrawFn) -> tuple[Pieces, int]:
    """Pieces of documents, some read twice or in part, and a window length."""
    lengths = draw(st.lists(st.integers(0, 400), min_size=1, max_size=60))
    documents = np.array(draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=80)))
    whole = np.array(lengths, dtype=np.int64)[documents]
    rng = np.random.default_rng(draw(SEEDS))
    begins = np.where(rng.random(len(whole)) < 0.3, rng.integers(0, whole + 1), 0)
    return Pieces(documents, begins, whole), draw(st.integers(8, 150))


def spans(layout: Layout, window: int) -> list[tuple[int, int, int]]:
    runs = layout.runs(window)
    columns = (layout.documents[runs].tolist(), layout.begins[runs].tolist(), layout.ends[runs].tolist())
    return list(zip(*columns, strict=True))


def counts(spans: list[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
    """How often every token (document, place) occurs."""
    found: dict[tuple[int, int], int] = {}
    for document, begin, end in spans:
        for place in range(begin, end):
            found[document, place] = found.get((document, place), 0) + 1
    return found


@given(selection=selections(), packing=st.sampled_from(["concatenate", "best-fit"]))
def test_tokens_in_are_those_kept_and_those_dropped(selection: tuple[Pieces, int], packing: str) -> None:
    pieces, length = selection
    layout = concatenate(pieces, length) if packing == "concatenate" else pack_best_fit(pieces, length, 0, cut_anywhere)
    ledger = layout.ledger
    placed = [span for window in range(layout.num_windows) for span in spans(layout, window)]
    assert ledger.tokens_in == int((pieces.ends - pieces.begins).sum())
    assert ledger.tokens_in == ledger.tokens_kept + sum(ledger.dropped.values())
    assert ledger.tokens_kept == sum(end - begin for _, begin, end in placed)
    assert ledger.num_padding == layout.num_windows * length - ledger.tokens_kept
    # The same tokens, not only as many: none is invented, none is there more often than it was read.
    given_spans = counts(
        list(zip(pieces.documents.tolist(), pieces.begins.tolist(), pieces.ends.tolist(), strict=True))
    )
    for token, count in counts(placed).items():
        assert count <= given_spans[token]
    for window in range(layout.num_windows):
        filled = sum(end - begin for _, begin, end in spans(layout, window))
        assert filled == length if packing == "concatenate" else length <= 2 * filled <= 2 * length


@given(selection=selections())
def test_concatenation_is_the_text_in_its_order(selection: tuple[Pieces, int]) -> None:
    pieces, length = selection
    layout = concatenate(pieces, length)
    stream = [
        (int(document), place)
        for document, begin, end in zip(pieces.documents, pieces.begins, pieces.ends, strict=True)
        for place in range(begin, end)
    ]
    joined = [
        (document, place)
        for window in range(layout.num_windows)
        for document, begin, end in spans(layout, window)
        for place in range(begin, end)
    ]
    assert joined == stream[: len(joined)]
    assert len(stream) - len(joined) < length
    assert layout.ledger.num_padding == 0


@given(selection=selections())
def test_best_fit_cuts_no_piece_that_fits(selection: tuple[Pieces, int]) -> None:
    pieces, length = selection
    layout = pack_best_fit(pieces, length, 0, cut_anywhere)
    whole = set(zip(pieces.documents.tolist(), pieces.begins.tolist(), pieces.ends.tolist(), strict=True))
    long = {span for span in whole if span[2] - span[1] > length}
    for window in range(layout.num_windows):
        for document, begin, end in spans(layout, window):
            assert (document, begin, end) in whole or any(
                document == each[0] and each[1] <= begin and end <= each[2] for each in long
            )
    assert layout.ledger.num_cut == sum(
        end - begin > length for begin, end in zip(pieces.begins, pieces.ends, strict=True)
    )


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Loads of the windows, by the textbook's loop over single pieces."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            best = min(fitting, key=lambda number: rooms[number])
            rooms[best] -= length
        else:
            rooms.append(capacity - length)
    return sorted(capacity - room for room in rooms)


@settings(max_examples=300)
@given(lengths=st.lists(st.integers(1, 40), max_size=120), capacity=st.integers(40, 90))
def test_best_fit_in_groups_is_best_fit_piece_by_piece(lengths: list[int], capacity: int) -> None:
    window_of, num_windows = best_fit(np.array(lengths, dtype=np.int64), capacity)
    loads = np.bincount(window_of, weights=lengths, minlength=num_windows) if lengths else np.zeros(0)
    assert sorted(int(load) for load in loads) == plain_best_fit(lengths, capacity)
    assert sum(2 * load < capacity for load in loads) <= 1


def test_a_piece_that_fits_into_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        best_fit(np.array([3, 9]), 8)


def test_best_fit_wastes_little_where_padding_each_document_wastes_half() -> None:
    lengths = np.maximum(np.random.default_rng(0).lognormal(6, 1, 5000).astype(np.int64), 1)
    layout = pack_best_fit(Pieces.whole(lengths), 8192, 0, cut_anywhere)
    assert layout.ledger.num_padding < 0.003 * layout.ledger.tokens_kept
    assert len(lengths) * 8192 > 2 * lengths.sum()


def test_documents_stand_in_a_window_in_drawn_order() -> None:
    lengths = np.tile([50, 30, 20], 200)
    layout = pack_best_fit(Pieces.whole(lengths), 100, 0, cut_anywhere)
    first = [int(layout.ends[layout.first_run[window]]) for window in range(layout.num_windows)]
    assert set(first) == {50, 30, 20}
    again = pack_best_fit(Pieces.whole(lengths), 100, 0, cut_anywhere)
    other = pack_best_fit(Pieces.whole(lengths), 100, 1, cut_anywhere)
    np.testing.assert_array_equal(layout.documents, again.documents)
    assert (layout.documents != other.documents).any()


def test_the_ledger_reads_as_a_sentence() -> None:
    ledger = concatenate(Pieces.whole(np.array([1000, 40])), 500).ledger
    assert ledger.sentence() == "1,040 tokens in = 1,000 in windows + 40 dropped (40 behind the last whole window)"


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    repeats=st.lists(st.integers(0, 19), max_size=60),
)
def test_no_window_holds_a_document_twice(lengths: list[int], repeats: list[int]) -> None:
    read = np.array([*range(len(lengths)), *(number % len(lengths) for number in repeats)], dtype=np.int64)
    ends = np.asarray(lengths, dtype=np.int64)[read]
    layout = pack_best_fit(Pieces(read, np.zeros_like(ends), ends), 60, 0, lambda document, begin, end: end)
    for window in range(layout.num_windows):
        inside = layout.documents[layout.runs(window)].tolist()
        assert len(inside) == len(set(inside))
    ledger = layout.ledger
    assert ledger.tokens_in == ledger.tokens_kept + sum(ledger.dropped.values()) == int(ends.sum())
