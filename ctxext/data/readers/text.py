"""Plain text files: each a document, and one that is very long a document a piece, cut where a line ends."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import IO

from ctxext.data.bad_rows import BadRows
from ctxext.data.documents import Documents, Part
from ctxext.data.readers.compressed import LineCounter, named_trouble, open_binary, skip_bytes
from ctxext.data.readers.paths import short_name
from ctxext.data.readers.rows import EMPTY_FILE, text_document

# A book has a megabyte; what is longer is a collection, and need not be in memory at once.
MAX_PIECE_BYTES = 16 << 20
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_small_files(part: Part, start: int, bad: BadRows) -> Documents:
    """Files of a part of many; positions count files."""
    for number, name in enumerate(part.paths):
        if number >= start:
            path = Path(name)
            with named_trouble(path, bad):
                for _, document in _pieces(path, 0, bad):
                    yield number + 1, document


def read_large_file(part: Part, start: int, bad: BadRows) -> Documents:
    """One file in pieces; positions count bytes of the decompressed content."""
    path = Path(part.paths[0])
    with named_trouble(path, bad):
        yield from _pieces(path, start, bad)


def _pieces(path: Path, start: int, bad: BadRows) -> Documents:
    with open_binary(path) as stream:
        skip_bytes(stream, start)
        lines = LineCounter(path, start)
        position = start
        while piece := _next_piece(stream, position):
            whole = position == 0 and len(piece) < MAX_PIECE_BYTES
            text = _decoded(piece, path, position, lines, bad)
            end = position + len(piece)
            if text is None and position == 0:
                return  # not text from its first piece on: one trouble, not one a piece
            if text is not None:
                origin = short_name(path) if whole else f"{short_name(path)} (bytes {position:,} to {end:,})"
                document = text_document(origin, text, str(path), bad)
                if document is not None:
                    yield end, document
            position = end
            lines.passed += piece.count(b"\n")
        if position == 0:
            bad.leave_out(path, EMPTY_FILE)


def _next_piece(stream: IO[bytes], position: int) -> bytes:
    """The next bytes up to the end of a line (of a character where there is no line); all of a short file."""
    piece = stream.read(MAX_PIECE_BYTES)
    if len(piece) < MAX_PIECE_BYTES:
        return piece
    if position == 0 and _encoding_of(piece) != "utf-8":
        return piece + stream.read(3 * MAX_PIECE_BYTES)  # cannot be cut by bytes
    piece += stream.readline(MAX_PIECE_BYTES)
    return piece + stream.read(_bytes_to_character_end(piece))


def _bytes_to_character_end(data: bytes) -> int:
    """How many bytes the last character of UTF-8 text still lacks."""
    for back in range(1, 4):
        lead = data[-back]
        if lead >= 0xC0:
            return max((2 if lead < 0xE0 else 3 if lead < 0xF0 else 4) - back, 0)
        if lead < 0x80:
            return 0
    return 0


def _encoding_of(data: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8")


def _decoded(data: bytes, path: Path, position: int, lines: LineCounter, bad: BadRows) -> str | None:
    encoding = _encoding_of(data) if position == 0 else "utf-8"
    if encoding.startswith("utf-8"):
        data = data.removeprefix(codecs.BOM_UTF8) if position == 0 else data
    elif len(data) > 3 * MAX_PIECE_BYTES:
        bad.refuse(
            str(path), f"a long file in {encoding.upper()} cannot be read in pieces", hint="Convert it to UTF-8."
        )
        return None
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = lines.number + (data.count(b"\n", 0, error.start) if encoding == "utf-8" else 0)
        bad.refuse(f"{path}:{line}", f"not {encoding.upper()} text ({error.reason})", hint="Convert the file to UTF-8.")
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")
