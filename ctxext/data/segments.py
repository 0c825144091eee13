"""Tokenised documents on disk: Arrow files that are complete or not there, read through the page cache.

A segment is a folder that appears with one rename:

    segment-00000/tokens.arrow    ids, learned, origin, digest of every document (a stream that `datasets` reads too)
    segment-00000/segment.json    how many, and from where to where in the part
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctxext.data.tokenize import Batch, Ids, Mask, TokenDocument
from ctxext.errors import ArtefactError
from ctxext.files import directory_atomic, read_json, write_json_atomic

_TOKENS, _RECORD = "tokens.arrow", "segment.json"
# Documents are written in blocks of about so many tokens: 4 MB of memory, and few blocks to open.
_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class SegmentRecord:
    """What a finished segment says of itself.

    Attributes:
        begin, end: positions in the part: where reading began, and where the next segment goes on.
        last: nothing of the part is left behind this segment.
        bad_rows: counts of unusable rows met on the way.
    """

    num_documents: int
    num_tokens: int
    begin: int
    end: int
    last: bool
    file_bytes: int
    bad_rows: dict[str, Any]


def segment_path(folder: Path, number: int) -> Path:
    """`folder/segment-00000`."""
    return folder / f"segment-{number:05d}"


class SegmentWriter:
    """Writes the documents of one segment, block by block; memory does not grow with them."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._id_type = pa.from_numpy_dtype(np.dtype(dtype))
        self._sink = pa.OSFile(str(path / _TOKENS), "wb")
        self._schema = pa.schema(
            [
                ("ids", pa.list_(self._id_type)),
                ("learned", pa.list_(pa.bool_())),
                ("origin", pa.string()),
                ("digest", pa.uint64()),
            ]
        )
        self._writer = pa.RecordBatchStreamWriter(self._sink, self._schema)
        self._block: list[TokenDocument] = []
        self._block_tokens = 0
        self.num_documents = 0
        self.num_tokens = 0

    def add(self, document: TokenDocument) -> None:
        """Append a document."""
        self._block.append(document)
        self._block_tokens += len(document.ids)
        self.num_documents += 1
        self.num_tokens += len(document.ids)
        if self._block_tokens >= _BLOCK_TOKENS:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._writer.close()
        self._sink.close()

    def abandon(self) -> None:
        """Let go of the file after an error."""
        self._sink.close()

    def _flush(self) -> None:
        if not self._block:
            return
        lengths = [len(document.ids) for document in self._block]
        ids = np.concatenate([document.ids for document in self._block])
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(ids, type=self._id_type)),
            pa.array([document.learned for document in self._block], type=pa.list_(pa.bool_())),
            pa.array([document.origin for document in self._block], type=pa.string()),
            pa.array([_digest(document.ids) for document in self._block], type=pa.uint64()),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._block, self._block_tokens = [], 0


def write_segment(
    destination: Path,
    begin: int,
    batches: Iterable[Batch[int]],
    dtype: npt.DTypeLike,
    is_enough: Callable[[npt.NDArray[np.int64]], bool],
    bad_rows: Callable[[], dict[str, Any]],
) -> SegmentRecord:
    """Write batches of documents until `is_enough(lengths of the batch)` or their end.

    Raises:
        ResourceError: the disk is full; nothing is left of the segment.
    """
    with directory_atomic(destination) as partial:
        writer = SegmentWriter(partial, dtype)
        try:
            position, last = begin, True
            for batch in batches:
                for _, document in batch.documents:
                    writer.add(document)
                position = batch.behind
                if is_enough(np.array([len(document.ids) for _, document in batch.documents], dtype=np.int64)):
                    last = False
                    break
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        record = SegmentRecord(
            num_documents=writer.num_documents,
            num_tokens=writer.num_tokens,
            begin=begin,
            end=position,
            last=last,
            file_bytes=(partial / _TOKENS).stat().st_size,
            bad_rows=bad_rows(),
        )
        write_json_atomic(partial / _RECORD, asdict(record))
    return record


class Segment:
    """A finished segment, mapped into memory: reading it costs no memory that the system could not take back.

    Raises:
        ArtefactError: the file is not as its record says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.record = SegmentRecord(**read_json(path / _RECORD))
            size = (path / _TOKENS).stat().st_size
        except (TypeError, OSError) as error:
            raise ArtefactError(f"a damaged segment of the token cache ({error})", where=str(path)) from error
        if size != self.record.file_bytes:
            raise ArtefactError(
                "a segment of the token cache was cut short or grew",
                where=str(path / _TOKENS),
                got=size,
                expected=f"{self.record.file_bytes} bytes",
            )

    @cached_property
    def _blocks(self) -> list[Any]:
        try:
            with pa.memory_map(str(self.path / _TOKENS)) as source:
                blocks: list[Any] = pa.ipc.open_stream(source).read_all().to_batches()
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtefactError(
                f"a damaged segment of the token cache ({str(error).splitlines()[0]})", where=str(self.path)
            ) from error
        return blocks

    @cached_property
    def _first(self) -> npt.NDArray[np.int64]:
        """Number of the first document of every block."""
        return np.cumsum([0, *(block.num_rows for block in self._blocks)])

    @cached_property
    def _arrays(self) -> list[tuple[Ids, npt.NDArray[np.int32], bool]]:
        """Ids, offsets and whether anything is masked, of every block; views of the file."""
        return [
            (
                block.column("ids").values.to_numpy(zero_copy_only=True),
                block.column("ids").offsets.to_numpy(zero_copy_only=True),
                block.column("learned").null_count < block.num_rows,
            )
            for block in self._blocks
        ]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[documents] tokens of every document."""
        parts = [np.diff(offsets).astype(np.int64) for _, offsets, _ in self._arrays]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def ids(self, document: int) -> Ids:
        """A view of one document's ids."""
        block, row = self._place(document)
        ids, offsets, _ = self._arrays[block]
        return ids[offsets[row] : offsets[row + 1]]

    def learned(self, document: int) -> Mask | None:
        """What of one document counts as a target; all of it when None."""
        block, row = self._place(document)
        if not self._arrays[block][2]:
            return None
        entry = self._blocks[block].column("learned")[row]
        return np.asarray(entry.values.to_numpy(zero_copy_only=False)) if entry.is_valid else None

    def origin(self, document: int) -> str:
        """The name of one document."""
        block, row = self._place(document)
        return str(self._blocks[block].column("origin")[row].as_py())

    def digests(self) -> npt.NDArray[np.uint64]:
        """[documents] what identifies the ids of every document, whichever segment it stands in."""
        parts = [block.column("digest").to_numpy() for block in self._blocks]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)

    def verify(self) -> None:
        """Compare every document's ids with its digest, reading all of them.

        Raises:
            ArtefactError: they differ.
        """
        for document, digest in enumerate(self.digests().tolist()):
            if _digest(self.ids(document)) != digest:
                raise ArtefactError(
                    "the checksum of a document in the token cache differs",
                    where=f"{self.path}, {self.origin(document)}",
                    hint="Remove this folder; it is built again.",
                )

    def _place(self, document: int) -> tuple[int, int]:
        block = int(np.searchsorted(self._first, document, side="right")) - 1
        return block, document - int(self._first[block])


def _digest(ids: Ids) -> int:
    """64 bits of the ids, whatever type holds them."""
    return int.from_bytes(hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).digest(), "little")


def segments_of(folder: Path) -> Iterator[Segment]:
    """The finished segments of a part, in order.

    Raises:
        ArtefactError: one is damaged.
    """
    number = 0
    while (path := segment_path(folder, number)).is_dir():
        yield Segment(path)
        number += 1
