"""What cannot be trained on is named with file, line and reason; it stops the build unless the source allows it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_sources import COMPRESS, json_lines, rows

from ctxext.data.readers import json_lines as json_lines_reader
from ctxext.data.sources import BadRows, iter_documents, read_part, source_parts
from ctxext.errors import ArtefactError
from ctxext.recipe.data import SourceBlock

GOOD = b'{"text": "good"}\n'

# What the second line of a file of rows may be, and what is said about it.
BROKEN_LINES: dict[str, tuple[bytes, str]] = {
    "cut": (b'{"text": "a', "not valid JSON; got 'Unterminated string starting at (column 10)'"),
    "no JSON": (b"text", "not valid JSON; got 'Expecting value (column 1)'"),
    "two values": (b'{"text": "a"} {"text": "b"}', "not valid JSON; got 'Extra data"),
    "no object": (b'["text"]', "the row is no object with fields; got 'a list'"),
    "bare null": (b"null", "the row is no object with fields; got 'null'"),
    "other field": (b'{"content": "a", "id": 1}', "the row has no field 'text'; got 'fields: content, id'"),
    "null": (b'{"text": null}', "the field 'text' holds no text; got 'null'"),
    "number": (b'{"text": 12}', "the field 'text' holds no text; got 'a number (12)'"),
    "list": (b'{"text": ["a"]}', "the field 'text' holds no text; got 'a list'"),
    "NUL byte": (b'{"text": "a\x00b"}', "it holds NUL bytes, which no text does"),
    "written NUL": (b'{"text": "a\\u0000b"}', "it holds NUL bytes, which no text does"),
    "Latin-1": (b'{"text": "caf\xe9"}', "not UTF-8 text"),
    "half a pair": (b'{"text": "a\\ud800"}', "it holds half of a surrogate pair"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not usable JSON; got 'RecursionError"),
    "long number": (b'{"text": ' + b"1" * 5000 + b"}", "not usable JSON; got 'ValueError"),
}


def text_source(path: Path, **fields: int) -> SourceBlock:
    return SourceBlock(kind="text", paths=[str(path)], **fields)  # type: ignore[arg-type]


def read_all(source: SourceBlock) -> tuple[list[str], BadRows]:
    bad = BadRows(source.max_bad_rows)
    return [document.text for document in iter_documents(source, 0, bad)], bad


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", BROKEN_LINES)
def test_a_broken_line_is_named_by_file_line_and_reason(name: str, ending: str, tmp_path: Path) -> None:
    line, reason = BROKEN_LINES[name]
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](GOOD + line + b"\n" + GOOD))
    with pytest.raises(ArtefactError) as caught:
        read_all(text_source(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: {reason}")
    assert message.endswith("or set max_bad_rows of this source to go on without it.")
    assert "\n" not in message
    texts, bad = read_all(text_source(path, max_bad_rows=1))
    assert texts == ["good", "good"]
    assert [tally.examples for tally in bad.bad.values()] == [[f"{path}:2"]]


def test_one_more_than_allowed_stops_with_all_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"no\n" + GOOD + b"no\n" + b'{"text": 1}\n' + GOOD)
    assert read_all(text_source(path, max_bad_rows=3))[1].num_bad == 3
    with pytest.raises(ArtefactError, match=r":4: .* 3 rows or files are unusable \(2 x not valid JSON, 1 x the field"):
        read_all(text_source(path, max_bad_rows=2))


def test_empty_rows_are_left_out_and_counted_but_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": " "}\n\n' + GOOD + b'{"text": ""}')
    texts, bad = read_all(text_source(path))
    assert texts == ["good"]
    assert bad.facts() == {
        "bad": {},
        "left_out": {"no text in it": {"count": 2, "examples": [f"{path}:1", f"{path}:4"]}},
    }


def test_a_line_is_named_right_behind_the_place_where_reading_went_on(tmp_path: Path) -> None:
    for ending, compress in COMPRESS.items():
        path = tmp_path / f"rows.jsonl{ending}"
        path.write_bytes(compress(json_lines(rows(5)) + b"no\n"))
        source = text_source(path)
        [part] = source_parts(source, 0)
        positions = [at for at, _ in read_part(source, part, 0, bad=BadRows(1))]
        with pytest.raises(ArtefactError, match=r"jsonl[.a-z0-9]*:6: not valid JSON"):
            list(read_part(source, part, 0, start=positions[2], bad=BadRows()))


def test_a_line_of_200_megabytes_is_passed_over_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as stream:
        stream.write(GOOD + b'{"text": "')
        for _ in range(200):
            stream.write(b"x" * 1_000_000)
        stream.write(b'"}\n' + GOOD)
    tracemalloc.start()
    texts, bad = read_all(text_source(path, max_bad_rows=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"peak {peak / 1e6:.0f} MB for a line of 200 MB")
    assert texts == ["good", "good"]
    assert bad.facts()["bad"] == {"a line is longer than 64.0 MiB": {"count": 1, "examples": [f"{path}:2"]}}
    assert peak < 2.1 * json_lines_reader.MAX_ROW_BYTES
    with pytest.raises(ArtefactError, match=r"rows\.jsonl:2: a line is longer than 64\.0 MiB; got '190\.7 MiB'"):
        read_all(text_source(path))


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
@pytest.mark.parametrize("name", ["rows.jsonl", "text.txt", "rows.json"])
def test_a_truncated_compressed_file_is_never_taken_for_its_end(name: str, ending: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(32, 127, 60_000, dtype=np.uint8).tobytes().replace(b'"', b" ")
    row = json.dumps({"text": noise.decode()}).encode()
    data = {"rows.jsonl": GOOD + row + b"\n" + GOOD, "text.txt": noise, "rows.json": b"[" + row + b"]"}[name]
    path = tmp_path / f"{name}{ending}"
    whole = COMPRESS[ending](data)
    for cut in (len(whole) - 1, len(whole) // 2, 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtefactError, match=f"{name}{ending}: the compressed file is (cut short|damaged)"):
            read_all(text_source(path))
    path.write_bytes(whole)
    assert read_all(text_source(path))[0]


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
def test_a_damaged_compressed_file_is_named(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(b"this is not compressed at all, whatever the name says\n")
    with pytest.raises(ArtefactError, match="the compressed file is damaged"):
        read_all(text_source(path))


ENCODINGS: dict[str, tuple[bytes, str | None]] = {
    "UTF-8 with a mark": ("\ufeffcafé".encode(), "café"),
    "UTF-16": ("café".encode("utf-16"), "café"),
    "UTF-32": ("café".encode("utf-32"), "café"),
    "Windows lines": (b"a\r\nb\rc", "a\nb\nc"),
    "Latin-1": (b"first\nsecond caf\xe9", None),
    "UTF-8 and Latin-1": ("café\n".encode() + b"caf\xe9", None),
    "NUL": (b"a\x00b", None),
    "UTF-16 without a mark": ("ab".encode("utf-16-le"), None),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_that_say_what_they_are_are_read_and_others_refused(name: str, tmp_path: Path) -> None:
    data, text = ENCODINGS[name]
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    if text is not None:
        assert read_all(text_source(path))[0] == [text]
        return
    with pytest.raises(ArtefactError, match=r"text\.txt(:2)?: (not UTF-8 text|it holds NUL bytes)") as caught:
        read_all(text_source(path))
    assert (":2:" in str(caught.value)) == ("Latin-1" in name)


def test_rows_in_utf_16_are_refused_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.decode().encode("utf-16"))
    with pytest.raises(ArtefactError, match=r":1: not UTF-8 text \(the file begins like UTF-16\)"):
        read_all(text_source(path))


def test_a_mark_before_the_first_row_is_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert read_all(text_source(path))[0] == ["good"]


BROKEN_FILES: dict[str, tuple[str, bytes, str]] = {
    "list cut": ("a.json", b'[{"text": "a"},\n{"text": "b"', ":2: not valid JSON"),
    "list without end": ("a.json", b'[{"text": "a"}\n', ":2: not valid JSON"),
    "list of numbers": ("a.json", b"[1,\n 2]", ":1: the row is no object with fields; got 'a number (1)'"),
    "number in a list": ("a.json", b'[{"text": "a"},\n\n{"text": 3}]', ":3: the field 'text' holds no text"),
    "parquet cut": ("a.parquet", b"PAR1abc", ": the Parquet file is damaged or cut short"),
    "parquet empty": ("a.parquet", b"", ": the Parquet file is damaged or cut short"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_named(name: str, tmp_path: Path) -> None:
    file, data, message = BROKEN_FILES[name]
    (tmp_path / file).write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(ArtefactError) as caught:
        read_all(text_source(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / file}{message}")
    assert "good" in read_all(text_source(tmp_path, max_bad_rows=2))[0]


def test_parquet_rows_and_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), path)
    with pytest.raises(ArtefactError, match=r"rows\.parquet, row 2: the field 'text' holds no text; got 'null'"):
        read_all(text_source(path))
    assert read_all(text_source(path, max_bad_rows=1))[0] == ["a", "b"]
    for field, message in (
        ("body", "the file has no column 'body'; got 'columns: text, n'. Name the right"),
        ("n", "row 1: the field 'n' holds no text; got 'a number"),
    ):
        with pytest.raises(ArtefactError, match=message):
            read_all(SourceBlock(kind="text", paths=[str(path)], text_field=field))


def test_parquet_text_that_is_not_utf_8_is_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": pa.array([b"a", b"caf\xe9", b"b"], pa.binary()).view(pa.string())}), path)
    with pytest.raises(ArtefactError, match=r"rows\.parquet, row 2: not UTF-8 text"):
        read_all(text_source(path))
    assert read_all(text_source(path, max_bad_rows=1))[0] == ["a", "b"]


def test_a_source_without_a_usable_document_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b'{"text": ""}\n')
    with pytest.raises(ArtefactError, match=r"\(weight 1\) has no usable document: .*1 left out: an empty file"):
        read_all(text_source(tmp_path))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"2 left out: an empty file"):
        read_all(text_source(tmp_path))
    (tmp_path / "bad.jsonl").write_bytes(b"no\n")
    with pytest.raises(ArtefactError, match=r"has no usable document: 1 unusable: not valid JSON \(.*bad\.jsonl:1\)"):
        read_all(text_source(tmp_path, max_bad_rows=5))


def test_a_loop_of_links_ends_and_every_file_is_read_once(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "one.txt").write_text("one")
    (inner / "up").symlink_to(tmp_path)
    (inner / "again").symlink_to(tmp_path / "a")
    for paths in ([str(tmp_path)], [str(tmp_path / "**" / "*.txt")], [str(tmp_path / "**")]):
        bad = BadRows()
        source = SourceBlock(kind="text", paths=paths)
        assert [document.text for document in iter_documents(source, 0, bad)] == ["one"]
    folder = BadRows()
    list(iter_documents(text_source(tmp_path), 0, folder))
    assert folder.facts()["left_out"]["a symbolic link to a folder that was read already"]["count"] == 2


@pytest.mark.parametrize("name", ["self.txt", "gone.txt"])
def test_links_that_lead_nowhere_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / name).symlink_to(tmp_path / ("self.txt" if name == "self.txt" else "nothing"))
    for path in (tmp_path, tmp_path / "*.txt", tmp_path / name):
        with pytest.raises(ArtefactError, match=f"{name}: a symbolic link that leads nowhere or to itself"):
            read_all(text_source(path))
    assert read_all(text_source(tmp_path, max_bad_rows=1))[0] == ["good"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a file that cannot be read, also by root")
@pytest.mark.parametrize(
    "name", ["text.txt", "rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.zst", "a.parquet"]
)
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(ArtefactError, match=rf"{name}: (the file cannot be read|the Parquet file is damaged)"):
        read_all(text_source(tmp_path / name))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ArtefactError, match="not a regular file"):
        read_all(text_source(tmp_path / "pipe.txt"))


@pytest.mark.parametrize("pattern", ["", "no/such/*.txt", "a\x00b", "x" * 5000])
def test_paths_that_name_nothing_are_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"data\.sources\.paths: (no file matches|the path cannot be looked up)"):
        read_all(SourceBlock(kind="text", paths=[str(tmp_path / "sub") + os.sep + pattern]))


def test_hidden_files_are_taken_only_by_name(tmp_path: Path) -> None:
    (tmp_path / "._rows.txt").write_text("hidden")
    (tmp_path / "rows.txt").write_text("seen")
    for path, texts in ((tmp_path, ["seen"]), (tmp_path / "*.txt", ["seen"]), (tmp_path / ".*.txt", ["hidden"])):
        assert read_all(text_source(path))[0] == texts


def test_counts_of_several_processes_add_up_to_the_limit() -> None:
    first, second, both = BadRows(9), BadRows(9), BadRows(3)
    for number in range(2):
        first.refuse(f"a:{number}", "broken")
        second.refuse(f"b:{number}", "broken")
    second.leave_out("b:9", "empty")
    both.merge(json.loads(json.dumps(first.facts())))
    with pytest.raises(ArtefactError, match="4 rows or files are unusable"):
        both.merge(second.facts())
    assert both.num_bad == 4
    assert both.bad["broken"].examples == ["a:0", "a:1", "b:0"]
    assert both.left_out["empty"].count == 1


WRITERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", WRITERS)
def test_files_of_several_streams_are_read_to_their_end(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(WRITERS[ending](GOOD) + WRITERS[ending](GOOD))
    assert read_all(text_source(path))[0] == ["good", "good"]
