"""Text that was tokenised elsewhere: `.npy` arrays, and raw `.bin` ones with a sidecar that names their type.

    corpus.bin       ids, one behind the other
    corpus.bin.json  {"dtype": "uint16", "separator": 0}

The sidecar is a must for `.bin` and may stand beside `.npy`. `separator` is the id between documents; without it an
array [N] is one document and every row of an array [R, N] is one. Which tokenizer made the ids is the user's knowledge:
ids beyond the vocabulary are refused, others cannot be told apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from ctxext.data.bad_rows import BadRows
from ctxext.data.documents import Documents, Part, TextDocument
from ctxext.data.readers.compressed import named_trouble
from ctxext.data.readers.paths import short_name
from ctxext.errors import ArtefactError, first_line
from ctxext.files import read_json
from ctxext.recipe.base import Block

ENDINGS = (".npy", ".bin")
# An array without separators is cut into documents of this many tokens, more than any window holds.
MAX_DOCUMENT_TOKENS = 1 << 24
_SCANNED_AT_ONCE = 1 << 22

Ids = npt.NDArray[np.unsignedinteger[Any]]


class Sidecar(Block):
    """What an array of ids does not say itself.

    Attributes:
        separator: the id between documents; it belongs to none of them.
        offset_bytes: length of a header before the first id of a `.bin` file.
    """

    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = None
    separator: Annotated[int, Field(ge=0)] | None = None
    offset_bytes: Annotated[int, Field(ge=0)] = 0


def read_tokens(part: Part, start: int, bad: BadRows) -> Documents:
    """Documents of one array; positions count ids, or rows."""
    path = Path(part.paths[0])
    with named_trouble(path, bad):
        opened = _open(path, bad)
        if opened is None:
            return
        array, separator = opened
        rows = _rows(array, start) if array.ndim == 2 else _runs(array, separator, start)
        for position, name, ids in rows:
            if ids.dtype.kind == "i" and len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= 1 << 32):
                bad.refuse(
                    f"{path}, {name}", "token ids are below 0 or above 32 bits", got=f"{ids.min()} to {ids.max()}"
                )
            elif not len(ids):
                bad.leave_out(f"{path}, {name}", "no tokens in it")
            else:
                unsigned = ids.astype(np.uint32) if ids.dtype.kind == "i" else ids
                yield position, TextDocument(f"{short_name(path)}, {name}", "", ids=unsigned)


def check_ids(ids: Ids, vocab_size: int, origin: str) -> None:
    """Refuse ids that the tokenizer does not have.

    Raises:
        ArtefactError: with the first such id and its place.
    """
    if len(ids) and int(ids.max()) >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        raise ArtefactError(
            "a token id is beyond the vocabulary",
            where=f"{origin}, token {at:,}",
            got=int(ids[at]),
            expected=f"ids below {vocab_size:,}",
            hint="The array was made with another tokenizer, or its sidecar names the wrong dtype.",
        )


def _open(path: Path, bad: BadRows) -> tuple[npt.NDArray[Any], int | None] | None:
    sidecar = _sidecar(path)
    if path.suffix == ".npy":
        try:
            array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        except OSError:
            raise
        except Exception as error:  # whatever NumPy's parser of headers stumbles over
            bad.refuse(
                path,
                "not a NumPy array file, or one that is cut short",
                got=first_line(error),
                hint="Name a raw array .bin and put a .bin.json with its dtype beside it.",
            )
            return None
    elif sidecar.dtype is None:
        raise ArtefactError(
            "a raw array of ids needs a file beside it that names its type",
            where=str(path),
            expected=f'{path.name}.json with {{"dtype": "uint16"}} or the like',
        )
    else:
        num_bytes, width = path.stat().st_size - sidecar.offset_bytes, np.dtype(sidecar.dtype).itemsize
        if num_bytes < width or num_bytes % width:
            bad.refuse(path, f"not a whole number of {sidecar.dtype} ids", got=f"{max(num_bytes, 0)} bytes")
            return None
        array = np.memmap(path, dtype=np.dtype(sidecar.dtype).newbyteorder("<"), mode="r", offset=sidecar.offset_bytes)
    if array.dtype.kind not in "ui" or array.ndim not in (1, 2):
        bad.refuse(path, "not an array [N] or [R, N] of whole numbers", got=f"{array.dtype} {list(array.shape)}")
        return None
    return array, sidecar.separator


def _sidecar(path: Path) -> Sidecar:
    beside = path.with_name(f"{path.name}.json")
    if not beside.is_file():
        return Sidecar()
    try:
        return Sidecar.model_validate(read_json(beside))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(place) for place in problem["loc"])
        raise ArtefactError(f"{key}: {problem['msg']}", where=str(beside)) from error


def _rows(array: npt.NDArray[Any], start: int) -> Any:
    for number in range(start, len(array)):
        yield number + 1, f"row {number}", array[number]


def _runs(array: npt.NDArray[Any], separator: int | None, start: int) -> Any:
    """Runs between separators, found a piece at a time; each with the position behind its separator."""
    begin = start
    scanned = start
    while scanned < len(array):
        end = min(scanned + _SCANNED_AT_ONCE, len(array))
        if separator is not None:
            for place in np.flatnonzero(array[scanned:end] == separator):
                at = scanned + int(place)
                if at > begin:
                    yield at + 1, f"tokens {begin:,} to {at:,}", array[begin:at]
                begin = at + 1
        scanned = end
        while scanned - begin >= MAX_DOCUMENT_TOKENS:
            cut = begin + MAX_DOCUMENT_TOKENS
            yield cut, f"tokens {begin:,} to {cut:,}", array[begin:cut]
            begin = cut
    if begin < len(array):
        yield len(array), f"tokens {begin:,} to {len(array):,}", array[begin:]
