"""Weights on disk, passed on without being loaded: files are linked, or copied piece by piece with some tensors edited.

An edit keeps shape and dtype, so a file's header stays as it is to the byte and only the edited tensors' ranges differ.
Peak memory is one block of rows, or one tensor for an edit that needs all of it.

A hard link is a second name of the same file, free in time and space. ctxext never writes into an existing weight file,
so neither name can change through it; but other programs may: safetensors 0.6 saves over a file in place (0.8 replaces
it), which changes the other name too; the folder's manifest then tells. Who wants to save over the new folder
asks for copies (`link=False`).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import Tensor

from ctxext.errors import ArtefactError, ResourceError, did_you_mean
from ctxext.export.stored import (
    StoredWeights,
    TensorInfo,
    checkpoint_tensors,
    open_source,
    read_header,
    read_range,
    read_rows,
    read_tensor,
)
from ctxext.files import format_bytes, require_free_space

__all__ = [
    "Edit",
    "RowwiseEdit",
    "StoredWeights",
    "StreamReport",
    "TensorInfo",
    "checkpoint_tensors",
    "read_header",
    "read_tensor",
    "row_scaling",
    "stream_weights",
]

PIECE_BYTES = 4 << 20
BLOCK_ELEMENTS = 4 << 20

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RowwiseEdit:
    """An edit that can be made a few rows at a time, so that a tensor of any size needs little memory.

    Attributes:
        function: gets rows `first`, `first + 1`, ... of the tensor in float32, and `first`; returns them edited.
    """

    function: Callable[[Tensor, int], Tensor]

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.function(tensor, 0)


def row_scaling(edit: Edit, num_rows: int) -> RowwiseEdit:
    """The same edit by rows, for one that does nothing but multiply each row by a number of its own.

    The numbers are found by editing a column of ones.
    """
    factors = edit(torch.ones(num_rows, 1))[:, 0]

    def scale(rows: Tensor, first: int) -> Tensor:
        return rows.mul_(factors[first : first + len(rows)].view(-1, *(1,) * (rows.ndim - 1)))

    return RowwiseEdit(scale)


@dataclass(frozen=True)
class StreamReport:
    """What became of each weight file, by name.

    Attributes:
        linked: a second name of the source's file.
        copied: byte for byte.
        edited: copied with some tensors rewritten.
    """

    linked: tuple[str, ...]
    copied: tuple[str, ...]
    edited: tuple[str, ...]
    num_tensors: int
    num_edited_tensors: int
    bytes_written: int

    def summary(self) -> str:
        """One line for people."""
        parts = [
            f"{len(names)} {word}"
            for names, word in ((self.linked, "hard-linked"), (self.copied, "copied"), (self.edited, "rewritten"))
            if names
        ]
        return (
            f"weight files: {', '.join(parts)}; {self.num_edited_tensors} of {self.num_tensors} tensors edited, "
            f"{format_bytes(self.bytes_written)} written"
        )


def stream_weights(
    source: Path, destination: Path, edits: Mapping[str, Edit] = MappingProxyType({}), *, link: bool = True
) -> StreamReport:
    """Bring the weights of `source` into `destination`, some tensors edited, without loading them.

    Files without edits are hard-linked, or copied where the file system cannot link. Edits are computed in float32
    (float64 where that is stored) and rounded once to the stored dtype. Give large tensors a `RowwiseEdit`: others are
    held whole.

    Args:
        source: folder with safetensors weights (for a hub model: its snapshot).
        destination: a folder that nobody reads yet, see `files.directory_atomic`; holds none of these files.
        edits: by tensor name; what an edit gets is its own to change in place.
        link: false forces copies.

    Raises:
        ArtefactError: the weights are damaged, a file exists already, or an edit names no tensor, changes a shape or
            gives numbers that are not finite.
        ResourceError: not enough disk. Nothing that was written is left.
    """
    weights = checkpoint_tensors(source)
    for name in edits:
        if name not in weights.tensors:
            near = did_you_mean(name, weights.tensors)
            raise ArtefactError(
                "the checkpoint has no tensor of this name",
                where=str(source),
                got=name,
                hint=f"The nearest is '{near}'." if near else None,
            )
    for file in (*weights.shards, *([weights.index] if weights.index else [])):
        if os.path.lexists(destination / file):
            raise ArtefactError("the weight file exists already", where=str(destination / file))
    started: list[Path] = []
    try:
        return _stream(weights, destination, edits, link, started)
    except BaseException as error:
        for path in started:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ResourceError(
                f"could not write the weights ({error.strerror or error})",
                where=str(destination),
                hint="Check free space and permissions.",
            ) from error
        raise


def _stream(
    weights: StoredWeights, destination: Path, edits: Mapping[str, Edit], link: bool, started: list[Path]
) -> StreamReport:
    """`started` collects the files that are there because of this call."""
    destination.mkdir(parents=True, exist_ok=True)
    edited = [file for file, tensors in weights.shards.items() if not edits.keys().isdisjoint(tensors)]
    linked: list[str] = []
    copied: list[str] = []
    for file in weights.shards:
        if file in edited:
            continue
        if link and _linked(weights.folder / file, destination / file):
            started.append(destination / file)
            linked.append(file)
        else:
            copied.append(file)
    bytes_written = sum((weights.folder / file).stat().st_size for file in (*edited, *copied))
    require_free_space(destination, bytes_written, "the weights")
    for file in (*copied, *edited):
        with open_source(weights.folder / file) as stream, (destination / file).open("xb", buffering=0) as out:
            started.append(destination / file)
            _rewrite(stream, out, weights.folder / file, weights.shards[file], edits)
    if weights.index:
        started.append(destination / weights.index)
        shutil.copyfile(weights.folder / weights.index, destination / weights.index)
    return StreamReport(tuple(linked), tuple(copied), tuple(edited), len(weights.tensors), len(edits), bytes_written)


def _linked(source: Path, destination: Path) -> bool:
    """Whether a hard link could be made; not across file systems, nor where it is not allowed."""
    try:
        os.link(source.resolve(), destination)  # resolved: the hub's cache holds symbolic links
    except OSError:
        return False
    return True


def _rewrite(
    stream: BinaryIO, out: BinaryIO, path: Path, tensors: Mapping[str, TensorInfo], edits: Mapping[str, Edit]
) -> None:
    """Copy a whole file in order, the edited tensors' ranges computed anew."""
    places = [(name, info) for name, info in tensors.items() if name in edits and info.num_bytes]
    ends = [0, *(info.end for _, info in places)]
    starts = [*(info.start for _, info in places), path.stat().st_size]
    for number, (begin, until) in enumerate(zip(ends, starts, strict=True)):
        _copy_range(stream, out, path, begin, until)
        if number < len(places):
            name, info = places[number]
            for block in _edited_blocks(stream, path, name, info, edits[name]):
                _write_all(out, block.reshape(-1).view(torch.uint8).numpy().data)


def _copy_range(stream: BinaryIO, out: BinaryIO, path: Path, begin: int, until: int) -> None:
    piece = memoryview(bytearray(min(PIECE_BYTES, until - begin)))
    for start in range(begin, until, PIECE_BYTES):
        part = piece[: min(PIECE_BYTES, until - start)]
        read_range(stream, path, start, part)
        _write_all(out, part)


def _write_all(out: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]


def _edited_blocks(stream: BinaryIO, path: Path, name: str, info: TensorInfo, edit: Edit) -> Iterator[Tensor]:
    """The edited tensor in its stored dtype, a block of rows at a time."""
    where = f"{path}: {name}"
    step = info.num_rows
    if isinstance(edit, RowwiseEdit) and info.shape:
        step = max(1, BLOCK_ELEMENTS // math.prod(info.shape[1:]))
    for first in range(0, info.num_rows, step):
        stored = read_rows(stream, path, info, first, min(step, info.num_rows - first))
        dtype, shape = stored.dtype, stored.shape
        values = stored if dtype == torch.float64 else stored.float()
        del stored
        with torch.no_grad():
            values = edit.function(values, first) if isinstance(edit, RowwiseEdit) else edit(values)
        if values.shape != shape:
            raise ArtefactError(
                "an edit must keep the shape", where=where, got=str(tuple(values.shape)), expected=str(tuple(shape))
            )
        rounded = values.to(dtype).contiguous()
        del values
        if not bool(torch.isfinite(rounded).all()):
            raise ArtefactError("the edited weights are not finite numbers", where=where, expected=f"finite {dtype}")
        yield rounded
