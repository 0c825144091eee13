"""Hugging Face datasets: of the hub by name, or local ones (`json`, `parquet`, `csv` with paths; `save_to_disk`).

Orders are our own, because a library's shuffle buffer cannot be resumed exactly. A streamed dataset is read shard by
shard in a seeded order, and shuffled within blocks of rows, each block by itself, so that going on behind any row costs
one block. A dataset on the disk is permuted as a whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk

from ctxext.data.bad_rows import BadRows
from ctxext.data.documents import Documents, Part
from ctxext.data.readers.rows import row_document
from ctxext.errors import ArtefactError, CtxextError, first_line, unknown_name
from ctxext.files import fingerprint
from ctxext.recipe.data import SourceBlock

# Of books, a hundred megabytes.
BLOCK_ROWS = 256
_ROWS_A_PART = 1 << 16
_ROWS_AT_ONCE = 16
_SAVED = ("dataset_info.json", "dataset_dict.json")


def dataset_parts(source: SourceBlock, seed: int) -> list[Part]:
    """One shard a part, in seeded order; of a dataset on the disk, a range of its permuted rows.

    Raises:
        ArtefactError: the dataset cannot be found or read.
        UsageError: it has no such split.
    """
    name = _name(source)
    with _named_trouble(source):
        if _is_random_access(source):
            rows = _open_rows(source)
            return [
                Part(
                    f"{name}/{begin}",
                    f"{rows._fingerprint}/{len(rows)}",
                    begin=begin,
                    end=min(begin + _ROWS_A_PART, len(rows)),
                )
                for begin in range(0, len(rows), _ROWS_A_PART)
            ]
        builder, stream = _open_stream(source)
        content = _content(builder, source)
        order = list(range(stream.num_shards))
        random.Random(f"documents/{seed}").shuffle(order)
        return [Part(f"{name}/{shard}", content, begin=shard, end=shard + 1) for shard in order]


def read_dataset(part: Part, source: SourceBlock, seed: int, start: int, bad: BadRows) -> Documents:
    """Rows of one part; positions count rows in the order in which they are read."""
    rows = _permuted_rows if _is_random_access(source) else _streamed_rows
    numbered = rows(part, source, seed, start)
    while True:
        with _named_trouble(source):
            found = next(numbered, None)
        if found is None:
            break
        position, number, row = found
        origin = f"{part.name}#{number}"
        document = row_document(row, source, origin, f"{part.name}, row {number}", bad)
        if document is not None:
            yield position, document


def _permuted_rows(part: Part, source: SourceBlock, seed: int, start: int) -> Iterator[tuple[int, int, Any]]:
    rows = _rows_of(source.model_dump_json(), part.fingerprint)
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    field = source.messages_field or source.text_field
    chosen = rows.select_columns([field]) if field in rows.column_names else rows
    assert part.end is not None
    for begin in range(max(start, part.begin), part.end, _ROWS_AT_ONCE):
        numbers = order[begin : min(begin + _ROWS_AT_ONCE, part.end)]
        for place, row in enumerate(chosen.select(numbers), start=begin + 1):
            yield place, int(numbers[place - begin - 1]), row


def _streamed_rows(part: Part, source: SourceBlock, seed: int, start: int) -> Iterator[tuple[int, int, Any]]:
    builder, stream = _stream_of(source.model_dump_json(), part.fingerprint)
    shard = stream.shard(stream.num_shards, part.begin) if stream.num_shards > 1 else stream
    field = source.messages_field or source.text_field
    first_block = start // BLOCK_ROWS
    num_rows = first_block * BLOCK_ROWS
    # Whole blocks are passed over in Arrow's form, which costs reading but no conversion.
    tables = islice(shard.with_format("arrow").iter(BLOCK_ROWS), first_block, None)
    for block, table in enumerate(tables, start=first_block):
        order = list(range(len(table)))
        random.Random(f"rows/{seed}/{part.begin}/{block}").shuffle(order)
        wanted = table.select([field]) if field in table.column_names else table.slice(0, len(table))
        for place, at in enumerate(order, start=num_rows):
            if place >= start:
                yield place + 1, num_rows + at, wanted.slice(at, 1).to_pylist()[0]
        num_rows += len(table)
    _refuse_early_end(builder, stream, source, num_rows, start)


def _refuse_early_end(builder: Any, stream: Any, source: SourceBlock, num_rows: int, start: int) -> None:
    expected = _promised_rows(builder, source)
    if expected and stream.num_shards == 1 and max(num_rows, start) < expected:
        raise ArtefactError(
            "the dataset ended early", where=_name(source), got=f"{num_rows:,} rows", expected=f"{expected:,} rows"
        )


def _is_random_access(source: SourceBlock) -> bool:
    return not source.streaming or _is_saved(source)


def _is_saved(source: SourceBlock) -> bool:
    """Whether the name is a folder that `save_to_disk` wrote."""
    folder = Path(source.name or "")
    return (folder / _SAVED[1]).is_file() or ((folder / _SAVED[0]).is_file() and (folder / "state.json").is_file())


def _open_rows(source: SourceBlock) -> Any:
    if not _is_saved(source):
        return load_dataset(
            source.name, source.config, data_files=source.paths or None, split=source.split, revision=source.revision
        )
    found: Dataset | DatasetDict = load_from_disk(source.name)
    if isinstance(found, Dataset):
        return found
    if source.split not in found:
        raise unknown_name("split", source.split, list(found), where=_name(source))
    return found[source.split]


def _open_stream(source: SourceBlock) -> tuple[Any, Any]:
    builder = load_dataset_builder(
        source.name, source.config, data_files=source.paths or None, revision=source.revision
    )
    return builder, builder.as_streaming_dataset(source.split)


@lru_cache(maxsize=4)
def _rows_of(source: str, _content: str) -> Any:
    return _open_rows(SourceBlock.model_validate_json(source))


@lru_cache(maxsize=4)
def _stream_of(source: str, _content: str) -> tuple[Any, Any]:
    return _open_stream(SourceBlock.model_validate_json(source))


def _content(builder: Any, source: SourceBlock) -> str:
    """Commit of the hub, or names and times of local files."""
    files = builder.config.data_files or {}
    listed = files.get(source.split) or [file for names in files.values() for file in names]
    origins = [list(origin) for names in files.values() for origin in getattr(names, "origin_metadata", [])]
    named = [source.name, source.config, source.split, source.revision, _promised_rows(builder, source)]
    return fingerprint([*named, [str(file) for file in listed], origins])


def _promised_rows(builder: Any, source: SourceBlock) -> int | None:
    """How many rows the dataset's card says that there are."""
    splits = builder.info.splits or {}
    return splits[source.split].num_examples if source.split in splits else None


def _name(source: SourceBlock) -> str:
    """The dataset's name, of a local folder its last part."""
    assert source.name is not None
    return Path(source.name).name if Path(source.name).is_absolute() else source.name


@contextmanager
def _named_trouble(source: SourceBlock) -> Iterator[None]:
    try:
        yield
    except CtxextError:
        raise
    except Exception as error:  # the library raises its own, the hub's, pyarrow's and the system's errors
        cause = error.__cause__ if isinstance(error.__cause__, (pa.ArrowException, OSError, ValueError)) else error
        raise ArtefactError(
            f"could not read the dataset ({first_line(cause)})",
            where=f"data.sources: {source.name}",
            hint="Names without a folder or files of yours are looked up on the Hugging Face hub."
            if not source.paths and not Path(source.name or "").exists()
            else None,
        ) from error
