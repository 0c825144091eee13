"""Which documents are read: sources keep their weights, long ones come as often as asked, no token is lost silently."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxext.data.sampling import Selection, choose_documents, target_advice, too_short
from ctxext.errors import ArtefactError, UsageError
from ctxext.recipe.data import DataBlock

WINDOW = 100


def block(*sources: dict[str, Any], **values: Any) -> DataBlock:
    """Sources by their settings, skip-wise unless asked otherwise, so that short documents are fine."""
    given_sources = [{"kind": "generated-words", **source} for source in sources or ({},)]
    windows = values.pop("windows", {"mode": "skip-wise", "length": WINDOW})
    return DataBlock.model_validate({"sources": given_sources, "windows": windows, **values})


def choose(lengths: list[int], data: DataBlock, source_of: list[int] | None = None, **values: Any) -> Selection:
    arguments = {"num_tokens": 10**9, "window_tokens": WINDOW, "seed": 0, **values}
    return choose_documents(np.array(lengths), np.array(source_of or [0] * len(lengths)), data, **arguments)


def spans(selection: Selection) -> list[tuple[int, int, int]]:
    columns = (selection.documents, selection.begins, selection.ends)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def long_share(selection: Selection, long_from: int, source: int) -> float:
    mine = selection.sources == source
    lengths = (selection.ends - selection.begins)[mine]
    return float(lengths[lengths >= long_from].sum() / lengths.sum())


def test_every_source_gives_its_share_in_reading_order_and_the_last_document_is_cut() -> None:
    selection = choose([40, 40, 40, 70, 70], block({"weight": 1.0}, {"weight": 2.0}), [0, 0, 0, 1, 1], num_tokens=150)
    assert spans(selection) == [(0, 0, 40), (1, 0, 11), (3, 0, 70), (4, 0, 31)]
    assert selection.tokens_by_source == (51, 101)
    assert [(entry.source, entry.num_documents, entry.num_tokens) for entry in selection.left_out] == [
        (0, 1, 69),
        (1, 0, 39),
    ]


def test_the_order_is_the_seeded_permutation_that_recorded_runs_rest_on() -> None:
    selection = choose([10] * 20, block(), seed=7)
    assert selection.documents.tolist() == np.random.default_rng([7, 1]).permutation(20).tolist()
    assert choose([10] * 20, block(), seed=8).documents.tolist() != selection.documents.tolist()


def test_a_source_that_ends_early_gives_what_it_has_and_says_so() -> None:
    selection = choose([30, 30, 500], block({}, {}), [0, 0, 1], num_tokens=400)
    assert selection.tokens_by_source == (60, 201)
    assert len(selection.notes) == 1
    assert "data.sources[0]" in selection.notes[0]
    assert "60 of the 201" in selection.notes[0]


@pytest.mark.parametrize("asked", [0.2, 0.6, 1.0])
def test_a_long_share_is_met_in_every_source_and_weights_stay(asked: float) -> None:
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(5, 40, 800).tolist(), *rng.integers(60, 200, 60).tolist()] * 2
    data = block({"weight": 3.0}, {"weight": 1.0}, length={"long_share": asked, "long_from": 60})
    selection = choose(lengths, data, [0] * 860 + [1] * 860, num_tokens=20_000)
    assert selection.tokens_by_source == (15_001, 5_001)
    for source in (0, 1):
        assert long_share(selection, 60, source) == pytest.approx(asked, abs=0.02)


def test_upsampling_takes_long_documents_so_much_more_often() -> None:
    lengths = [20] * 500 + [100] * 20
    data = block(length={"upsample": 5.0, "long_from": 100})
    selection = choose(lengths, data, num_tokens=6_000)
    # 10,000 tokens short and 2,000 long, so 5 x 2,000 against 10,000.
    assert long_share(selection, 100, 0) == pytest.approx(0.5, abs=0.01)
    counts = np.bincount(selection.documents, minlength=520)
    assert counts[500:].mean() / counts[:500].mean() == pytest.approx(5.0, rel=0.05)
    assert choose(lengths, block(length={"upsample": 1.0, "long_from": 100}), num_tokens=6_000).notes


def test_what_runs_out_is_repeated_evenly() -> None:
    data = block(length={"long_share": 0.5, "long_from": 100})
    selection = choose([10] * 30 + [100] * 3, data, num_tokens=3_000)
    counts = np.bincount(selection.documents, minlength=33)
    assert set(counts[:30].tolist()) <= {5, 6}
    assert set(counts[30:].tolist()) <= {5, 6}
    assert "5.0 times" in selection.notes[0]
    assert selection.distinct_tokens == 600


def test_sources_of_one_kind_of_length_are_taken_as_they_are_and_said() -> None:
    short = choose([10] * 50, block(length={"long_share": 0.6}), num_tokens=300)
    assert short.num_tokens == 301
    assert "no document has 50 tokens" in short.notes[0]
    long = choose([90] * 50, block(length={"long_share": 0.6}), num_tokens=300)
    assert long.num_tokens == 301
    assert "no short text" in long.notes[0]


def test_documents_below_the_minimum_are_left_out_and_those_above_the_maximum_cut_evenly() -> None:
    selection = choose([700, 40, 900], block({"min_tokens": 50, "max_tokens": 500}))
    assert spans(selection) == [(0, 0, 350), (0, 350, 700), (2, 0, 450), (2, 450, 900)]
    assert [(entry.reason, entry.num_documents, entry.num_tokens) for entry in selection.left_out] == [
        ("shorter than min_tokens (50)", 1, 40)
    ]


def test_excluded_documents_are_never_read_and_counted_once_under_their_reason() -> None:
    selection = choose([60, 40, 60, 60], block({"min_tokens": 50}), excluded={1: "held text", 3: "held text"})
    assert spans(selection) == [(0, 0, 60), (2, 0, 60)]
    assert [(entry.reason, entry.num_documents) for entry in selection.left_out] == [("held text", 2)]


@pytest.mark.parametrize(
    ("lengths", "source", "excluded"),
    [([], {}, {}), ([30, 20], {"min_tokens": 50}, {}), ([30], {}, {0: "held text"}), ([0, 0], {}, {})],
)
def test_a_source_without_usable_document_is_refused_by_name(
    lengths: list[int], source: dict[str, Any], excluded: dict[int, str]
) -> None:
    with pytest.raises(ArtefactError, match=r"data\.sources\[0\] \(generated-words\).*no usable document"):
        choose(lengths, block(source), excluded=excluded)


def test_full_length_windows_of_short_documents_are_refused_unless_allowed() -> None:
    lengths = [20] * 95 + [60]  # 1,960 tokens, 60 of them in a document of half a window
    full = {"mode": "full-length"}
    with pytest.raises(UsageError, match=r"data\.length\.allow_short: only 3\.1%"):
        choose(lengths, block(windows=full))
    assert choose(lengths, block(windows=full, length={"allow_short": True})).long_share == pytest.approx(60 / 1960)
    assert choose(lengths, block()).num_tokens == 1960  # skip-wise windows need no long documents
    asked = choose(lengths, block(windows=full), allow_short=True)
    assert too_short(asked, block(windows=full), WINDOW) is not None


def test_a_tenth_of_the_tokens_in_documents_of_half_a_window_is_enough() -> None:
    full = block(windows={"mode": "full-length"})
    assert choose([49] * 9 + [50], full, num_tokens=491).long_share == pytest.approx(50 / 491)
    with pytest.raises(UsageError):
        choose([49] * 10 + [50], full)
    with pytest.raises(UsageError):
        choose([49] * 20, full)


def test_the_table_tells_tokens_before_and_after_by_source_and_length() -> None:
    data = block({}, {}, length={"long_share": 0.5, "long_from": 100})
    selection = choose([10] * 40 + [150] * 2 + [30] * 10, data, [0] * 42 + [1] * 10, num_tokens=400)
    rows = {(row.source, row.bucket): (row.tokens_before, row.tokens_after) for row in selection.table()}
    assert rows[0, "below 12"][0] == 400
    assert rows[0, "100 to 199"][0] == 300
    assert rows[1, "25 to 49"][0] == 300
    assert sum(before for before, _ in rows.values()) == 1000
    assert sum(after for _, after in rows.values()) == selection.num_tokens == 402
    assert rows[0, "100 to 199"][1] == pytest.approx(100, abs=1)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2)), min_size=3, max_size=60),
    num_tokens=st.integers(1, 20_000),
    length=st.sampled_from([{}, {"long_share": 0.6}, {"upsample": 3.0}, {"long_share": 1.0, "long_from": 30}]),
    limits=st.sampled_from([{}, {"min_tokens": 20}, {"max_tokens": 70}, {"min_tokens": 20, "max_tokens": 70}]),
    excluded=st.sets(st.integers(0, 59), max_size=5),
)
def test_every_token_is_read_or_left_out_with_a_reason(
    lengths: list[tuple[int, int]],
    num_tokens: int,
    length: dict[str, Any],
    limits: dict[str, Any],
    excluded: set[int],
) -> None:
    # Every source has one document that may be read.
    tokens = [count for count, _ in lengths] + [50] * 3
    sources = [source for _, source in lengths] + [0, 1, 2]
    left = {number: "excluded" for number in excluded if number < len(lengths)}
    data = block(*({**limits, "weight": weight} for weight in (0.5, 1.0, 7.0)), length=length)
    selection = choose(tokens, data, sources, num_tokens=num_tokens, excluded=left)
    read = {number: np.zeros(count, dtype=bool) for number, count in enumerate(tokens)}
    for document, begin, end in spans(selection):
        assert 0 <= begin <= end <= tokens[document]
        assert end - begin <= limits.get("max_tokens", 400)
        assert document not in left
        read[document][begin:end] = True
    distinct = sum(int(mask.sum()) for mask in read.values())
    assert distinct == selection.distinct_tokens
    assert distinct + sum(entry.num_tokens for entry in selection.left_out) == sum(tokens)
    assert selection.num_tokens == sum(selection.tokens_by_source)
    if length:
        assert selection.tokens_by_source == tuple(int(num_tokens * w / 8.5) + 1 for w in (0.5, 1.0, 7.0))


def test_a_smaller_target_is_advised_when_documents_are_short() -> None:
    assert target_advice(np.array([3000] * 99 + [9000]), 2048, 16384) is None  # 99% is the longest of 100: 9,000
    advice = target_advice(np.array([3000] * 200), 2048, 16384)
    assert advice is not None
    assert "target_length=4096" in advice
    unneeded = target_advice(np.array([1000] * 200 + [30_000]), 2048, 16384)
    assert unneeded is not None
    assert "no extension is needed" in unneeded
    assert "longest 30,000" in unneeded
    assert target_advice(np.array([], dtype=np.int64), 2048, 16384) is None
    assert target_advice(np.array([6000] * 10), 4096, 8192) is None
