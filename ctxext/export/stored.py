"""The header of a safetensors file, checked, and the tensors of a checkpoint folder; ranges of them can be read.

A safetensors file is an 8-byte length, a JSON header and the tensors' bytes. Files are read in ranges, never mapped:
mapped pages would count as resident memory. A file that does not hold exactly what its header says is refused here,
with what was seen and what was expected, before anything is made from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ctxext.errors import ArtefactError
from ctxext.files import read_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # what safetensors itself accepts
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file.

    Attributes:
        dtype: safetensors' name of it, such as `BF16`.
        shape: may be empty (a scalar).
        start, end: byte range in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def num_rows(self) -> int:
        """Size of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class StoredWeights:
    """The headers of a folder's safetensors files.

    Attributes:
        shards: file name -> tensor name -> place.
        index: name of the index file; None when there is a single file.
    """

    folder: Path
    shards: Mapping[str, Mapping[str, TensorInfo]]
    index: str | None

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        return {name: info for shard in self.shards.values() for name, info in shard.items()}

    @cached_property
    def file_of(self) -> Mapping[str, str]:
        """Which file holds a tensor."""
        return {name: file for file, shard in self.shards.items() for name in shard}

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def main_dtype(self) -> torch.dtype | None:
        """The floating type that most bytes are stored in; None when there is none."""
        totals = dict.fromkeys(FLOAT_TYPES, 0)
        for info in self.tensors.values():
            if info.dtype in totals:
                totals[info.dtype] += info.num_bytes
        name = max(totals, key=lambda dtype: totals[dtype])
        return FLOAT_TYPES[name] if totals[name] else None

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Rows of a stored tensor, see `read_tensor`."""
        return read_tensor(self.folder / self.file_of[name], self.tensors[name], first, count)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """A safetensors file's tensors in the order they lie in it; no tensor is read.

    Raises:
        ArtefactError: not safetensors, cut short, or the byte ranges do not fill the file exactly.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(_LENGTH_BYTES)
            header_bytes = int.from_bytes(start, "little")
            if len(start) < _LENGTH_BYTES:
                raise _damaged(path, "the file is cut short", f"{size} bytes", "a header of 8 bytes or more")
            if header_bytes > _LARGEST_HEADER:
                raise _damaged(
                    path, "not a safetensors file", f"a header of {header_bytes} bytes", f"at most {_LARGEST_HEADER}"
                )
            data_start = _LENGTH_BYTES + header_bytes
            if data_start > size:
                raise _damaged(
                    path, "the file is cut short", f"{size} bytes", f"a header that ends at byte {data_start}"
                )
            text = stream.read(header_bytes)
    except OSError as error:
        raise ArtefactError(f"could not read the tensors ({error.strerror or error})", where=str(path)) from error
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise _damaged(path, f"the header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "the header is no table of tensors", type(entries).__name__)
    entries.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_ranges(path, tensors, data_start, size)
    return tensors


def _damaged(path: Path, what: str, got: str | None = None, expected: str | None = None) -> ArtefactError:
    return ArtefactError(f"could not read the tensors: {what}", where=str(path), got=got, expected=expected)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: {name}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(shape, list)
        or not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_count, [*shape, *offsets]))
    ):
        raise ArtefactError(
            "could not read the tensors: a header entry is malformed",
            where=where,
            got=repr(entry)[:80],
            expected="dtype, shape and two data_offsets",
        )
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ArtefactError(
            "could not read the tensors: unknown dtype", where=where, got=str(dtype), expected=", ".join(_BITS)
        )
    info = TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    num_bits = math.prod(shape) * _BITS[dtype]
    if info.num_bytes * 8 != num_bits:
        raise ArtefactError(
            "could not read the tensors: the byte range does not fit the shape",
            where=where,
            got=f"{info.num_bytes} bytes",
            expected=f"{num_bits / 8:g} bytes for {dtype} {shape}",
        )
    return info


def _check_ranges(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    # Without gaps, no bytes can hide between tensors; without overlaps, rewriting one cannot change another.
    reached, before = data_start, "the header"
    for name, info in tensors.items():
        if info.start != reached:
            what = "two tensors overlap" if info.start < reached else "bytes between two tensors belong to none"
            raise _damaged(path, f"{what} ({before} and {name})", f"byte {info.start}", f"byte {reached}")
        reached, before = info.end, name
    if reached != size:
        what = "the file is cut short" if size < reached else "bytes after the last tensor belong to none"
        raise _damaged(path, what, f"{size} bytes", f"{reached} bytes")


def read_tensor(path: Path, info: TensorInfo, first: int = 0, count: int | None = None) -> Tensor:
    """`count` rows of a floating-point tensor from row `first` on (all of it by default), as a private copy.

    Raises:
        ArtefactError: the file cannot be read, or the tensor holds no plain floating-point numbers.
    """
    with open_source(path) as stream:
        return read_rows(stream, path, info, first, info.num_rows - first if count is None else count)


def open_source(path: Path) -> BinaryIO:
    """A weight file for reading, unbuffered; ArtefactError when it cannot be opened."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise ArtefactError(f"could not read the tensors ({error.strerror or error})", where=str(path)) from error


def read_range(stream: BinaryIO, path: Path, start: int, into: memoryview) -> None:
    """Fill `into` from byte `start` on; ArtefactError when the file ends before."""
    try:
        stream.seek(start)
        filled = 0
        while filled < len(into):
            num_read = stream.readinto(into[filled:])  # type: ignore[attr-defined]  # raw files have it
            if not num_read:
                raise _damaged(path, "the file became shorter while it was read")
            filled += num_read
    except OSError as error:
        raise ArtefactError(f"could not read the tensors ({error.strerror or error})", where=str(path)) from error


def read_rows(stream: BinaryIO, path: Path, info: TensorInfo, first: int, count: int) -> Tensor:
    """`read_tensor` on a file that is open already."""
    dtype = FLOAT_TYPES.get(info.dtype)
    if dtype is None:
        raise ArtefactError(
            "only plain floating-point tensors can be computed with",
            where=str(path),
            got=info.dtype,
            expected=", ".join(FLOAT_TYPES),
            hint="Start from the checkpoint before it was quantised.",
        )
    shape = (count, *info.shape[1:]) if info.shape else ()
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    row_bytes = info.num_bytes // info.num_rows
    data = bytearray(count * row_bytes)
    read_range(stream, path, info.start + first * row_bytes, memoryview(data))
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def checkpoint_tensors(folder: Path) -> StoredWeights:
    """The tensors of a folder that transformers could load: `model.safetensors`, or an index and its shards.

    Raises:
        ArtefactError: no safetensors weights, a damaged file, or index and shards disagree.
    """
    if (folder / SINGLE_NAME).is_file():
        return StoredWeights(folder, {SINGLE_NAME: read_header(folder / SINGLE_NAME)}, None)
    if not (folder / INDEX_NAME).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise ArtefactError(
            "the folder holds no safetensors weights",
            where=str(folder),
            got=pickles[0] if pickles else None,
            expected=f"{SINGLE_NAME} or {INDEX_NAME}",
            hint="Pickled weights can run code: convert them first (load once with transformers, save_pretrained)."
            if pickles
            else None,
        )
    named = read_index(folder / INDEX_NAME)
    for file in sorted(set(named.values())):
        if not (folder / file).is_file():
            raise ArtefactError("the index names a shard that is missing", where=str(folder / INDEX_NAME), got=file)
    shards = {file: read_header(folder / file) for file in sorted(set(named.values()))}
    for file, tensors in shards.items():
        _check_shard(folder / file, set(tensors), {name for name, place in named.items() if place == file})
    return StoredWeights(folder, shards, INDEX_NAME)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index file.

    Raises:
        ArtefactError: malformed, or it names a file outside its folder.
    """
    index = read_json(path)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise ArtefactError("the index has no weight_map from tensor names to files", where=str(path))
    for file in sorted(set(named.values())):
        # Lexically, because shards in the hub's cache are links that lead out of their folder.
        if Path(file).name != file or "\0" in file:
            raise ArtefactError("the index names a file outside its folder", where=str(path), got=file)
    return dict(named)


def _check_shard(path: Path, stored: set[str], named: set[str]) -> None:
    for names, what in (
        (named - stored, "a shard lacks tensors that the index places there"),
        (stored - named, "a shard holds tensors that the index does not place there"),
    ):
        if names:
            raise ArtefactError(what, where=str(path), got=f"{min(names)} ({len(names)} in all)")
