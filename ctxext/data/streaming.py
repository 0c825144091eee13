"""Windows made while training, for text that no disk holds; goes on exactly where a checkpoint left off.

Sources are read side by side, the next document always from the one that is furthest behind its weight. A *block* of
documents at a time is shuffled and packed; what fills no window moves to the next block, so nothing is dropped. A
checkpoint holds where every source stood at the start of the block, what was carried into it, and how many windows of
it were read: going on costs one block, seconds, whatever was read before. Every process reads the same stream and keeps
its own windows, so the number of processes changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ctxext.data.bad_rows import BadRows
from ctxext.data.documents import TextDocument
from ctxext.data.layout import Layout, Pieces
from ctxext.data.order import Cursor, Share, share_of, window_order
from ctxext.data.packing import PackedWindow, WindowAssembler, layout_of
from ctxext.data.sources import no_document_error, read_part, source_parts
from ctxext.data.tokenize import Encoder, TokenDocument, TokenStream, stream_of, tokenizer_fingerprint
from ctxext.errors import ArtefactError, UsageError
from ctxext.files import fingerprint
from ctxext.recipe.data import STREAMED, DataBlock, SourceBlock

# Enough windows to shuffle, few enough tokens to make them anew in seconds.
_BLOCK_TOKENS = 1 << 20
_BLOCK_WINDOWS = 16
# Another order in every pass over a source; far from the seeds of its neighbours.
_PASS_STRIDE = 1_000_003


@dataclass(frozen=True)
class SourcePosition:
    """Where reading one source stands.

    Attributes:
        num_passes: how often the whole source was read.
        part, position: the next document: number of the part, and the position in it.
        part_fingerprint: of that part's content; None before the first document.
        num_tokens: given so far.
    """

    num_passes: int = 0
    part: int = 0
    position: int = 0
    part_fingerprint: str | None = None
    num_tokens: int = 0


class SourceStream:
    """Documents of one source without end: when it is read, it is read again in another order.

    Raises:
        ArtefactError: the source is not there, or not what it was when `position` was taken.
    """

    def __init__(self, encoder: Encoder, source: SourceBlock, seed: int, position: SourcePosition) -> None:
        self._encoder = encoder
        self._source = source
        self._seed = seed
        self.position = position
        self.bad_rows = BadRows(source.max_bad_rows)
        self._documents = self._read(position)
        self._last_used_pass = position.num_passes

    def next_pieces(self) -> list[TokenDocument]:
        """The next document, in equal pieces where it is longer than `max_tokens`; shorter than `min_tokens`, the one
        behind it.

        Raises:
            ArtefactError: a whole pass gave no document that is long enough.
        """
        while True:
            (num_passes, part, at, content), document = next(self._documents)
            pieces = list(_sized(document, self._source))
            num_tokens = self.position.num_tokens + sum(len(piece.ids) for piece in pieces)
            self.position = SourcePosition(num_passes, part, at, content, num_tokens)
            if pieces:
                self._last_used_pass = num_passes
                return pieces
            self.bad_rows.leave_out(document.origin, f"shorter than min_tokens ({self._source.min_tokens})")
            if num_passes > self._last_used_pass + 1:
                raise no_document_error(self._source, self.bad_rows)

    def _read(self, start: SourcePosition) -> Iterator[tuple[tuple[int, int, int, str], TokenDocument]]:
        batches = self._encoder.batches(self._marked(start), self.bad_rows)
        return chain.from_iterable(batch.documents for batch in batches)

    def _marked(self, start: SourcePosition) -> Iterator[tuple[tuple[int, int, int, str], TextDocument]]:
        num_passes, first, position = start.num_passes, start.part, start.position
        while True:
            seed = self._seed + _PASS_STRIDE * num_passes
            parts = source_parts(self._source, seed)
            if start.part_fingerprint is not None and num_passes == start.num_passes:
                self._check(parts[first].fingerprint if first < len(parts) else None, start)
            found = position > 0 or first > 0
            for number in range(first, len(parts)):
                part = parts[number]
                for at, document in read_part(self._source, part, seed, start=position, bad=self.bad_rows):
                    found = True
                    yield (num_passes, number, at, part.fingerprint), document
                position = 0
            if not found:
                raise no_document_error(self._source, self.bad_rows)
            num_passes, first = num_passes + 1, 0

    def _check(self, content: str | None, start: SourcePosition) -> None:
        if content != start.part_fingerprint:
            raise ArtefactError(
                "the source changed since the checkpoint was written, so reading cannot go on where it stopped",
                where=f"data.sources: {', '.join(self._source.paths) or self._source.name or self._source.kind}",
                hint="Restore the source, or start the run anew with another output_dir.",
            )


@dataclass(frozen=True)
class Carried:
    """Text that filled no window of the last block.

    Attributes:
        continued: its document began in an earlier window.
    """

    ids: list[int]
    learned: list[bool] | None
    continued: bool


@dataclass(frozen=True)
class BlockStart:
    """All that decides a block and everything behind it."""

    number: int
    sources: tuple[SourcePosition, ...]
    carried: tuple[Carried, ...]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "number": self.number,
            "sources": [vars(position) for position in self.sources],
            "carried": [vars(text) for text in self.carried],
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> BlockStart:
        """The way back."""
        return BlockStart(
            values["number"],
            tuple(SourcePosition(**position) for position in values["sources"]),
            tuple(Carried(**text) for text in values["carried"]),
        )


@dataclass(frozen=True)
class _Block:
    """Documents of one block with their windows, and how the next block starts."""

    start: BlockStart
    documents: TokenStream
    layout: Layout
    order: list[int]
    following: BlockStart


def require_streamable(data: DataBlock) -> None:
    """Refuse what needs the whole text before the first window.

    Raises:
        UsageError: length-aware sampling, or a comparison with the evaluation that could stop the run.
    """
    if data.length.long_share is not None or data.length.upsample is not None:
        raise UsageError(
            "length-aware sampling needs to know all documents, and a stream does not",
            where="data.cache",
            got=STREAMED,
            hint="Leave data.cache out, so that the sources are tokenised to the disk first.",
        )
    if data.contamination != "report":
        raise UsageError(
            "a stream is not compared with the texts of the evaluation before it is trained on",
            where="data.contamination",
            got=data.contamination,
            expected="report, with data.cache: none",
            hint="Leave data.cache out, so that the sources are tokenised to the disk and compared first.",
        )


class StreamedWindows:
    """Windows in the order in which they are read; takes the place of a `WindowBuilder`.

    Raises:
        UsageError: settings that need to know all documents before the first is read.
    """

    def __init__(self, data: DataBlock, tokenizer: Any, target_length: int) -> None:
        require_streamable(data)
        self._data = data
        self._encoder = Encoder(tokenizer)
        self._assembler = WindowAssembler(data, tokenizer, target_length)
        self.length = self._assembler.length
        self._block_tokens = max(_BLOCK_TOKENS, _BLOCK_WINDOWS * self.length)
        self.sha256 = fingerprint([tokenizer_fingerprint(tokenizer), data.model_dump(mode="json")], digits=64)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ctxext-stream")
        self._begin(BlockStart(0, tuple(SourcePosition() for _ in data.sources), ()), 0, 0)

    def step_windows(self, cursor: Cursor, count: int, share: Share) -> list[PackedWindow]:
        """One process's share of the next `count` windows.

        Raises:
            ValueError: `cursor` is not where the stream stands.
        """
        if cursor.num_consumed != self._num_consumed:
            raise ValueError(f"the stream stands at window {self._num_consumed}, not {cursor.num_consumed}")
        chosen = [self._next() for _ in range(count)]
        costs = [self._cost(*place) for place in chosen] if self._assembler.isolated else None
        return [self._build(*chosen[place]) for place in share_of(count, share, costs)]

    def stream_state(self) -> dict[str, Any]:
        """What a checkpoint must hold for `restore`."""
        return {"block": self._start.to_json(), "read": self._read}

    def restore(self, state: dict[str, Any] | None, num_consumed: int) -> None:
        """Go on where `stream_state` was taken.

        Raises:
            ArtefactError: the checkpoint holds no such state.
        """
        if state is None:
            raise ArtefactError("the checkpoint does not say where the streamed sources stood", where="data.cache")
        self._begin(BlockStart.from_json(state["block"]), state["read"], num_consumed)

    @property
    def tokens_by_source(self) -> tuple[int, ...]:
        """Tokens that each source had given at the start of the current block."""
        return tuple(position.num_tokens for position in self._start.sources)

    def _begin(self, start: BlockStart, num_read: int, num_consumed: int) -> None:
        """`num_read` windows of the block that begins at `start` have been read already."""
        self._start, self._read, self._num_consumed = start, num_read, num_consumed
        self._block: _Block | None = None
        self._streams: list[SourceStream] | None = None
        self._ahead: Future[_Block] | None = None

    def _next(self) -> tuple[_Block, int]:
        """The block and number of the next window; the block behind it is made meanwhile."""
        block = self._block
        if block is not None and self._read == len(block.order):
            self._start, self._read = block.following, 0
            block = None
        if block is None:
            block = self._block = (self._ahead or self._reader.submit(self._make, self._start)).result()
            self._ahead = self._reader.submit(self._make, block.following)
        self._read += 1
        self._num_consumed += 1
        return block, block.order[self._read - 1]

    def _make(self, start: BlockStart) -> _Block:
        """Read, shuffle and pack a block; runs beside training, one at a time."""
        if self._streams is None:
            self._streams = [
                SourceStream(self._encoder, source, self._data.seed + number, position)
                for number, (source, position) in enumerate(zip(self._data.sources, start.sources, strict=True))
            ]
        carried = [
            TokenDocument(
                np.array(text.ids, dtype=self._encoder.dtype),
                np.array(text.learned, dtype=np.bool_) if text.learned is not None else None,
                "carried",
            )
            for text in start.carried
        ]
        fresh = self._read_documents(sum(len(document.ids) for document in carried))
        order = np.random.default_rng([self._data.seed, 4, start.number]).permutation(len(fresh))
        documents = stream_of([*carried, *(fresh[index] for index in order)])
        find_cut = self._assembler.find_cut(documents)
        layout = layout_of(Pieces.whole(documents.lengths), self._data, self.length, find_cut)
        for number, text in enumerate(start.carried):
            if text.continued:
                layout.fresh[(layout.documents == number) & (layout.begins == 0)] = False
        following = BlockStart(
            start.number + 1,
            tuple(stream.position for stream in self._streams),
            tuple(_uncovered(documents, layout)),
        )
        windows = window_order(self._data.seed, start.number, layout.num_windows)
        return _Block(start, documents, layout, windows, following)

    def _read_documents(self, num_tokens: int) -> list[TokenDocument]:
        """Documents by weight until the block, which holds `num_tokens` already, is full."""
        assert self._streams is not None
        streams = self._streams
        documents: list[TokenDocument] = []
        while num_tokens < self._block_tokens:
            behind = min(
                range(len(streams)),
                key=lambda number: streams[number].position.num_tokens / self._data.sources[number].weight,
            )
            pieces = streams[behind].next_pieces()
            documents += pieces
            num_tokens += sum(len(piece.ids) for piece in pieces)
        return documents

    def _build(self, block: _Block, index: int) -> PackedWindow:
        return self._assembler.finish(
            self._assembler.text(block.documents, block.layout, index), self._assembler.rng(block.start.number, index)
        )

    def _cost(self, block: _Block, index: int) -> int:
        return self._assembler.cost(block.layout, index, self._assembler.rng(block.start.number, index))


def _sized(document: TokenDocument, source: SourceBlock) -> Iterator[TokenDocument]:
    """The document, in equal pieces of at most `max_tokens`; nothing of one that is shorter than `min_tokens`."""
    length = len(document.ids)
    if length < (source.min_tokens or 0):
        return
    count = -(-length // source.max_tokens) if source.max_tokens else 1
    for number in range(count):
        part = slice(number * length // count, (number + 1) * length // count)
        yield TokenDocument(
            document.ids[part], document.learned[part] if document.learned is not None else None, document.origin
        )


def _uncovered(documents: TokenStream, layout: Layout) -> Iterator[Carried]:
    """What of the documents stands in no window: always their ends, since pieces are cut off from the front."""
    covered = np.zeros(len(documents.lengths), dtype=np.int64)
    np.maximum.at(covered, layout.documents, layout.ends)
    for document in np.flatnonzero(covered < documents.lengths).tolist():
        rest = slice(int(covered[document]), None)
        learned = documents.learned(document)
        yield Carried(
            documents.ids(document)[rest].tolist(),
            learned[rest].tolist() if learned is not None else None,
            continued=bool(covered[document]),
        )
