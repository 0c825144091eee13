"""Text files as a user hands them over: read, decoded, and refused in words where they are no text."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ctxext.errors import ArtefactError, UsageError
from ctxext.files import format_bytes

STDIN = "-"
_MOST_BYTES = 256 << 20
_MAGIC = {
    b"%PDF-": "a PDF; extract its text first, for example with pdftotext",
    b"PK\x03\x04": "a ZIP archive, as .docx, .epub and .xlsx are; export its text first",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"\xd0\xcf\x11\xe0": "an old Office file; export its text first",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GGUF": "model weights",
}
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class Document:
    """A text and what it is called."""

    name: str
    text: str


def read_documents(names: Sequence[str], stdin: BinaryIO | None = None) -> list[Document]:
    """Read files in the order given; `-` is the standard input.

    Raises:
        UsageError: no file, or the standard input twice.
        ArtefactError: a file that is missing, empty or no text.
    """
    if not names:
        raise UsageError("no document", where="--file", expected="a text file, or - for the standard input")
    if list(names).count(STDIN) > 1:
        raise UsageError("the standard input can be read once", where="--file", got="- twice")
    return [_document(name, stdin) for name in names]


def _document(name: str, stdin: BinaryIO | None) -> Document:
    shown = "standard input" if name == STDIN else name
    data = _bytes(name, stdin)
    if len(data) > _MOST_BYTES:
        raise ArtefactError("too large for one question", where=shown, expected=f"at most {format_bytes(_MOST_BYTES)}")
    text = _decoded(data, shown)
    if not text.strip():
        raise ArtefactError("the document is empty", where=shown)
    return Document(shown, text)


def _bytes(name: str, stdin: BinaryIO | None) -> bytes:
    if name == STDIN:
        return (stdin or sys.stdin.buffer).read(_MOST_BYTES + 1)
    try:
        with Path(name).expanduser().open("rb") as stream:
            return stream.read(_MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise ArtefactError("file not found", where=name) from error
    except (OSError, ValueError, RuntimeError) as error:  # a folder, no permission, a NUL in the name, ~nobody
        reason = getattr(error, "strerror", None) or error
        raise ArtefactError(f"could not read the file ({reason})", where=name[:200]) from error


def _decoded(data: bytes, shown: str) -> str:
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            raise ArtefactError(f"this is no text but {what}", where=shown)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\x00" in data:
        raise ArtefactError("this is no text but a binary file", where=shown)
    try:
        return data.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ArtefactError(
            f"not {encoding.upper()} text: byte {data[error.start]:#04x} at {error.start:,}",
            where=shown,
            hint="Convert it first, for example with: iconv -f WINDOWS-1252 -t UTF-8",
        ) from error
