"""Files opened for reading, decompressed by their ending; a cut or broken one is said, never taken for its end."""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from ctxext.data.bad_rows import BadRows

_PIECE = 1 << 20
COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
_CODECS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}


def is_compressed(path: Path) -> bool:
    """Whether the ending says so."""
    return path.name.lower().endswith(COMPRESSED_ENDINGS)


def plain_name(path: Path) -> str:
    """The file's name in lower case, without the ending of its compression."""
    name = path.name.lower()
    return name.rpartition(".")[0] if name.endswith(COMPRESSED_ENDINGS) else name


def open_binary(path: Path) -> IO[bytes]:
    """The decompressed content as a stream of bytes."""
    ending = path.name.lower().rpartition(".")[2]
    if ending == "xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if ending in _CODECS:
        # Arrow's readers are fast, and say of a cut file that it is cut; the common zstd readers take it for the end.
        raw = pa.CompressedInputStream(pa.OSFile(str(path)), _CODECS[ending])
        return cast(IO[bytes], io.BufferedReader(raw, _PIECE))
    return path.open("rb", buffering=_PIECE)


def skip_bytes(stream: IO[bytes], count: int) -> None:
    """Go forward without keeping anything; decompressing is all that a compressed file costs here."""
    if stream.seekable():
        stream.seek(count)
        return
    while count > 0 and (piece := stream.read(min(count, _PIECE))):
        count -= len(piece)


class LineCounter:
    """The number of the current line, which is only worked out when a message needs it.

    Attributes:
        passed: ends of lines seen since `start`.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._start = start
        self._before: int | None = None if start else 0
        self.passed = 0

    @property
    def number(self) -> int:
        """The current line, counted from 1."""
        if self._before is None:
            self._before, left = 0, self._start
            with open_binary(self._path) as stream:
                while left > 0 and (piece := stream.read(min(left, _PIECE))):
                    self._before += piece.count(b"\n")
                    left -= len(piece)
        return self._before + self.passed + 1

    def __str__(self) -> str:
        return f"{self._path}:{self.number}"


@contextmanager
def named_trouble(path: Path, bad: BadRows) -> Iterator[None]:
    """Everything that can go wrong while a file is read, as one unusable file."""
    try:
        yield
    except EOFError:
        bad.refuse(str(path), "the compressed file is cut short")
    except lzma.LZMAError as error:
        bad.refuse(str(path), "the compressed file is damaged", got=str(error))
    except OSError as error:
        # Arrow raises plain OSErrors, without a number, for damaged content.
        if error.errno is not None:
            bad.refuse(str(path), f"the file cannot be read ({error.strerror})")
        elif "runcated" in str(error):
            bad.refuse(str(path), "the compressed file is cut short")
        else:
            bad.refuse(str(path), "the compressed file is damaged", got=str(error).splitlines()[0][:200])
