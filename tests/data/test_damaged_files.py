"""Whatever bytes a file holds, reading it gives documents or an error that names it; nothing else escapes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sources import COMPRESS, json_lines, rows

from ctxext.data.sources import BadRows, iter_documents
from ctxext.errors import ArtefactError
from ctxext.recipe.data import SourceBlock


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows(20)), stream, row_group_size=7)
    return stream.getvalue()


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.arange(50, dtype=np.uint16))
    return stream.getvalue()


LINES = json_lines(rows(5))
WHOLE: dict[str, bytes] = {
    "a.txt": "text with ä and €\n".encode() * 5,
    "a.json": json.dumps(rows(5), indent=1).encode(),
    "a.parquet": _parquet(),
    "a.npy": _npy(),
    **{f"a.jsonl{ending}": compress(LINES) for ending, compress in COMPRESS.items()},
}


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_that_names_the_file_or_none_at_all(name: str, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    damaged = damaged[:cut] if data.draw(st.booleans()) else damaged
    kind = "tokens" if name.endswith(".npy") else "text"
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(bytes(damaged))
        for limit in (0, 100):
            bad = BadRows(limit)
            source = SourceBlock(kind=kind, paths=[str(path)], max_bad_rows=limit)  # type: ignore[arg-type]
            message = error_of(source, bad)
            assert message is None or (name in message and "\n" not in message)
            assert message is not None or bad.num_bad <= limit


def error_of(source: SourceBlock, bad: BadRows) -> str | None:
    """What reading all of it says, None when all is well; any other exception is a failure."""
    try:
        assert list(iter_documents(source, 0, bad))
    except ArtefactError as error:
        return str(error)
    return None
