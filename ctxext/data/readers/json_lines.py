"""JSON Lines, a row a line, and JSON files that hold a list of rows or one row.

A line is never held in memory when it is longer than `MAX_ROW_BYTES`: it is passed over and named. Positions count
bytes of the decompressed content, so that going on behind a row is a seek.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import IO, Any

from ctxext.data.bad_rows import BadRows
from ctxext.data.documents import Documents, Part
from ctxext.data.readers.compressed import LineCounter, named_trouble, open_binary, skip_bytes
from ctxext.data.readers.paths import short_name
from ctxext.data.readers.rows import EMPTY_FILE, NUL, row_document
from ctxext.errors import first_line
from ctxext.files import format_bytes
from ctxext.recipe.data import SourceBlock

# Twenty times the longest windows in use; a longer row is a mistake of whoever wrote the file.
MAX_ROW_BYTES = 64 << 20
# Lists need all of the file in memory.
MAX_LIST_BYTES = 256 << 20


_BROKEN = object()
_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_lines(part: Part, source: SourceBlock, start: int, bad: BadRows) -> Documents:
    """Rows whose line begins in the part's range of bytes."""
    path = Path(part.paths[0])
    with named_trouble(path, bad), open_binary(path) as stream:
        position, lines = _enter(stream, path, part, start)
        while part.end is None or position < part.end:
            line = stream.readline(MAX_ROW_BYTES + 1)
            if not line:
                break
            length = len(line)
            document = None
            if length > MAX_ROW_BYTES and not line.endswith(b"\n"):
                length += _pass_line(stream)
                bad.refuse(
                    lines,
                    f"a line is longer than {format_bytes(MAX_ROW_BYTES)}",
                    got=format_bytes(length),
                    hint="A row is one document; write long collections as several.",
                )
            elif line.strip():
                row = _row(line, position, lines, bad)
                if row is not _BROKEN:
                    document = row_document(row, source, f"{short_name(path)}@{position}", lines, bad)
            position += length
            lines.passed += 1
            if document is not None:
                yield position, document
        if position == 0:
            bad.leave_out(path, EMPTY_FILE)


def read_json(part: Part, source: SourceBlock, start: int, bad: BadRows) -> Documents:
    """Rows of a list, or of a file that holds JSON Lines under the ending of JSON; positions count what they name."""
    path = Path(part.paths[0])
    with named_trouble(path, bad):
        if not _is_whole(path):
            yield from read_json_lines(part, source, start, bad)
            return
        with open_binary(path) as stream:
            data = stream.read(MAX_LIST_BYTES + 1)
        if len(data) > MAX_LIST_BYTES:
            bad.refuse(
                str(path),
                f"a JSON value of more than {format_bytes(MAX_LIST_BYTES)} would have to be held in memory",
                hint="Convert the file to JSON Lines or Parquet.",
            )
            return
        yield from _whole(data, path, source, start, bad)


def _enter(stream: IO[bytes], path: Path, part: Part, start: int) -> tuple[int, LineCounter]:
    """Go to `start`, or to the first line that begins inside the part's range."""
    if start > part.begin or part.begin == 0:
        skip_bytes(stream, start)
        return start, LineCounter(path, start)
    skip_bytes(stream, part.begin - 1)
    position = part.begin - 1 + _pass_line(stream)
    return position, LineCounter(path, position)


def _pass_line(stream: IO[bytes]) -> int:
    """Read to the end of the line without keeping it; how many bytes that were."""
    passed = 0
    while piece := stream.readline(1 << 20):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _row(line: bytes, position: int, where: LineCounter, bad: BadRows) -> Any:
    """The parsed line, or `_BROKEN`."""
    if position == 0:
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            bad.refuse(where, "not UTF-8 text (the file begins like UTF-16)", hint="Convert the file to UTF-8.")
            return _BROKEN
        line = line.removeprefix(codecs.BOM_UTF8)
    if b"\x00" in line:
        bad.refuse(where, NUL)
        return _BROKEN
    try:
        return json.loads(line.rstrip(b"\r\n"))
    except UnicodeDecodeError as error:
        bad.refuse(where, f"not UTF-8 text ({error.reason})", got=f"byte {line[error.start]:#04x} at {error.start}")
    except json.JSONDecodeError as error:
        bad.refuse(where, "not valid JSON", got=f"{error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        bad.refuse(where, "not usable JSON", got=first_line(error))
    return _BROKEN


def _is_whole(path: Path) -> bool:
    """Whether the file is one JSON value over all of its lines, rather than a value a line."""
    with open_binary(path) as stream:
        head = b"\n"
        while head and not head.removeprefix(codecs.BOM_UTF8).strip():
            head = stream.readline(MAX_ROW_BYTES)
    head = head.removeprefix(codecs.BOM_UTF8).strip()
    if not head.startswith(b"{"):
        return head.startswith(b"[")
    try:
        json.loads(head)
    except (ValueError, RecursionError):
        return head == b"{" or not head.endswith(b"}")  # an object over several lines
    return False


def _whole(data: bytes, path: Path, source: SourceBlock, start: int, bad: BadRows) -> Documents:
    """Rows of one JSON value: each object of a list, or the object itself."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        bad.refuse(f"{path}:{line}", f"not UTF-8 text ({error.reason})", hint="Convert the file to UTF-8.")
        return
    decoder = json.JSONDecoder()
    at = _after_space(text, 0)
    is_list = text.startswith("[", at)
    at = _after_space(text, at + 1) if is_list else at
    number, counted, line = 0, 0, 1
    while at < len(text) and not (is_list and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            bad.refuse(f"{path}:{error.lineno}", "not valid JSON", got=f"{error.msg} (column {error.colno})")
            return  # where the next row would begin is anyone's guess
        except (ValueError, RecursionError) as error:
            bad.refuse(f"{path}:{line}", "not usable JSON", got=first_line(error))
            return
        number += 1
        if number > start:
            document = row_document(row, source, f"{short_name(path)}#{number}", f"{path}:{line}", bad)
            if document is not None:
                yield number, document
        at = _after_space(text, at)
        if not is_list:
            break
        if text.startswith(",", at):
            at = _after_space(text, at + 1)
        elif not text.startswith("]", at):
            break
    if is_list and not text.startswith("]", at):
        line += text.count("\n", counted, at)
        bad.refuse(f"{path}:{line}", "not valid JSON", got="a list that does not end where it should")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()
