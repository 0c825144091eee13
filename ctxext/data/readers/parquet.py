"""Parquet files, row group by row group, only the wanted column; positions count rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ctxext.data.bad_rows import BadRows
from ctxext.data.documents import Documents, Part
from ctxext.data.readers.compressed import named_trouble
from ctxext.data.readers.paths import short_name
from ctxext.data.readers.rows import row_document
from ctxext.errors import first_line
from ctxext.recipe.data import SourceBlock

_ROWS_AT_ONCE = 16  # of books, a few megabytes each


def read_parquet(part: Part, source: SourceBlock, start: int, bad: BadRows) -> Documents:
    """Rows of one file."""
    path = Path(part.paths[0])
    field = source.messages_field or source.text_field
    with named_trouble(path, bad):
        try:
            with pq.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
                names = file.schema_arrow.names
                if field in names:
                    yield from _rows(file, path, field, source, start, bad)
                else:
                    setting = "messages_field" if source.messages_field else "text_field"
                    bad.refuse(
                        path,
                        f"the file has no column '{field}'",
                        got=f"columns: {', '.join(names)}"[:200],
                        hint=f"Name the right column as {setting}.",
                    )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the file system's, not the content's
            bad.refuse(path, "the Parquet file is damaged or cut short", got=first_line(error))


def _rows(file: Any, path: Path, field: str, source: SourceBlock, start: int, bad: BadRows) -> Documents:
    first = 0
    for group in range(file.metadata.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        number = first
        first += num_rows
        if first <= start:
            continue
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[field], use_threads=False):
            if number + len(batch) > start:
                for at in range(len(batch)):
                    number += 1
                    if number > start:
                        where = f"{path}, row {number}"
                        try:
                            row = batch.slice(at, 1).to_pylist()[0]
                        except UnicodeDecodeError as error:
                            bad.refuse(where, f"not UTF-8 text ({error.reason})")
                            continue
                        document = row_document(row, source, f"{short_name(path)}#{number}", where, bad)
                        if document is not None:
                            yield number, document
            else:
                number += len(batch)
