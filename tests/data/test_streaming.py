"""A stream goes on exactly where it was left, whatever was read before, and loses and repeats nothing on the way."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from ctxext.data import streaming
from ctxext.data.order import Cursor, Share
from ctxext.data.packing import PackedWindow
from ctxext.data.streaming import StreamedWindows
from ctxext.errors import ArtefactError, UsageError
from ctxext.recipe.data import DataBlock, FactsBlock, LengthBlock, SourceBlock, WindowsBlock

TARGET, LENGTH = 4096, 256
STEP = 6


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 windows, so that few windows cross several of them."""
    monkeypatch.setattr(streaming, "_BLOCK_TOKENS", 1)


def rows(path: Path, count: int, mark: str) -> SourceBlock:
    """Numbered rows of 10 to 700 bytes."""
    texts = [f"{mark}{number:04d} " + "abc. " * (number * 37 % 140) for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceBlock(kind="text", paths=[str(path)])


def block(folder: Path, packing: Any = "concatenate", **changes: Any) -> DataBlock:
    sources = [rows(folder / "a.jsonl", 12, "A"), rows(folder / "b.jsonl", 90, "B").model_copy(update={"weight": 3.0})]
    windows = WindowsBlock(mode="skip-wise", length=LENGTH, packing=packing)
    return DataBlock(sources=sources, windows=windows, cache="none", **changes)


def steps(stream: StreamedWindows, first: int, count: int, share: Share | None = None) -> list[list[PackedWindow]]:
    return [
        stream.step_windows(Cursor(0, number * STEP), STEP, share or Share()) for number in range(first, first + count)
    ]


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
@pytest.mark.parametrize("facts", [None, FactsBlock(share=0.5)], ids=["text", "facts"])
def test_a_stream_goes_on_exactly_from_any_step(tmp_path: Path, packing: str, facts: FactsBlock | None) -> None:
    data = block(tmp_path, packing, facts=facts)
    whole = StreamedWindows(data, tokenizer(), TARGET)
    expected, states = [], []
    for number in range(14):
        states.append(json.loads(json.dumps(whole.stream_state())))
        expected += steps(whole, number, 1)
    assert len({state["block"]["number"] for state in states}) >= 4
    assert max(position["num_passes"] for position in states[-1]["block"]["sources"]) >= 1
    for first in (0, 1, 3, 7, 12):
        resumed = StreamedWindows(data, tokenizer(), TARGET)
        resumed.restore(states[first], first * STEP)
        assert steps(resumed, first, 14 - first) == expected[first:]


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
def test_nothing_is_lost_between_blocks(tmp_path: Path, packing: str) -> None:
    data = block(tmp_path, packing)
    stream = StreamedWindows(data, tokenizer(), TARGET)
    seen: Counter[int] = Counter()
    for number in range(1000):
        (window,) = stream.step_windows(Cursor(0, number), 1, Share())
        if stream.stream_state()["block"]["number"] == 4:
            break
        learned = window.learned or [True] * LENGTH
        seen.update(token for token, kept in zip(window.input_ids, learned, strict=True) if kept)
    carried = stream.stream_state()["block"]["carried"]
    assert sum(seen.values()) + sum(len(text["ids"]) for text in carried) == sum(stream.tokens_by_source)
    assert sum(seen.values()) > 4 * 15 * LENGTH * 0.9


def test_sources_give_their_shares(tmp_path: Path) -> None:
    stream = StreamedWindows(block(tmp_path), tokenizer(), TARGET)
    steps(stream, 0, 14)
    first, second = stream.tokens_by_source
    assert second / first == pytest.approx(3.0, rel=0.15)


def test_processes_share_the_windows_of_one(tmp_path: Path) -> None:
    data = block(tmp_path)
    one = steps(StreamedWindows(data, tokenizer(), TARGET), 0, 6)
    two = [steps(StreamedWindows(data, tokenizer(), TARGET), 0, 6, Share(index, 2)) for index in range(2)]
    for together, first, second in zip(one, *two, strict=True):
        assert together[0::2] == first
        assert together[1::2] == second


def test_a_changed_source_is_not_read_on(tmp_path: Path) -> None:
    data = block(tmp_path)
    stream = StreamedWindows(data, tokenizer(), TARGET)
    steps(stream, 0, 5)
    state = stream.stream_state()
    rows(tmp_path / "b.jsonl", 91, "C")
    resumed = StreamedWindows(data, tokenizer(), TARGET)
    resumed.restore(state, 5 * STEP)
    with pytest.raises(ArtefactError, match="changed since the checkpoint"):
        steps(resumed, 5, 1)


def test_a_stream_is_read_in_order_alone(tmp_path: Path) -> None:
    stream = StreamedWindows(block(tmp_path), tokenizer(), TARGET)
    with pytest.raises(ValueError, match="stands at window 0"):
        stream.step_windows(Cursor(0, 6), 6, Share())


def test_a_checkpoint_without_a_position_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not say where the streamed sources stood"):
        StreamedWindows(block(tmp_path), tokenizer(), TARGET).restore(None, 6)


def test_sampling_by_length_needs_the_documents_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.cache.*does not.*got 'none'|needs to know all documents"):
        StreamedWindows(block(tmp_path, length=LengthBlock(long_share=0.6)), tokenizer(), TARGET)


def test_a_guard_that_needs_the_documents_first_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.contamination"):
        StreamedWindows(block(tmp_path, contamination="exclude"), tokenizer(), TARGET)


def test_documents_that_are_all_too_short_end_the_search(tmp_path: Path) -> None:
    data = block(tmp_path)
    short = data.model_copy(update={"sources": [data.sources[0].model_copy(update={"min_tokens": 5000})]})
    with pytest.raises(ArtefactError, match=r"no usable document.*shorter than min_tokens"):
        steps(StreamedWindows(short, tokenizer(), TARGET), 0, 1)


def test_lengths_are_kept_as_the_source_says(tmp_path: Path) -> None:
    data = block(tmp_path)
    sized = [source.model_copy(update={"min_tokens": 50, "max_tokens": 100}) for source in data.sources]
    stream = StreamedWindows(data.model_copy(update={"sources": sized}), tokenizer(), TARGET)
    steps(stream, 0, 3)
    assert stream._block is not None
    lengths = stream._block.documents.lengths[len(stream._block.start.carried) :]
    assert lengths.max() <= 100
    assert lengths.min() >= 50


def test_going_on_does_not_read_what_was_read(tmp_path: Path) -> None:
    """A position deep in a large source is reached by a seek: no slower than the beginning, and far from a replay."""
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "some words. " * 80}) + "\n"
    path.write_text(line * 40_000)  # 38 MB
    data = DataBlock(
        sources=[SourceBlock(kind="text", paths=[str(path)])],
        windows=WindowsBlock(mode="skip-wise", length=LENGTH),
        cache="none",
    )
    stream = StreamedWindows(data, tokenizer(), TARGET)
    steps(stream, 0, 1)
    state = json.loads(json.dumps(stream.stream_state()))
    position = state["block"]["sources"][0]
    state["block"]["sources"] = [{**position, "part_fingerprint": fingerprint_of(data), "position": 39_000 * len(line)}]
    resumed = StreamedWindows(data, tokenizer(), TARGET)
    resumed.restore(state, STEP)
    started = time.process_time()
    steps(resumed, 1, 1)
    assert time.process_time() - started < 2.0


def fingerprint_of(data: DataBlock) -> str:
    from ctxext.data.sources import source_parts

    return source_parts(data.sources[0], data.seed)[0].fingerprint
