"""Training checkpoints: only what trains, written atomically with checksums; the older one is removed after the commit.

A checkpoint holds adapter, optimizer moments, random state of every process and the step. Learning rate and data order
are pure functions of the step, so they need no state; where streamed sources stand is not, and is stored.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxext.errors import ArtefactError
from ctxext.files import (
    directory_atomic,
    read_json,
    remove_partials,
    verify_manifest,
    write_json_atomic,
    write_manifest,
)
from ctxext.model.trained import share_like
from ctxext.recipe.effects import Difference, differences
from ctxext.train.adapter import read_tensors, tensor_write_errors, write_tensors
from ctxext.train.sharding import whole

_NAME = re.compile(r"step-(\d{6,})")
# Where bitsandbytes' optimizers put tensors that FSDP1 must not gather.
_WRAPPED = "__bnb_optimizer_quant_state__"


@dataclass(frozen=True)
class TrainState:
    """Where training stands and what decides every later number.

    Attributes:
        step: optimizer steps done.
        decides: the plan's values that change results, and what they became on this machine.
        data_sha256: of the token stream.
        num_processes: processes that shared each step.
        skipped_in_a_row: last steps without update, because something in them was not finite.
    """

    step: int
    decides: dict[str, Any]
    data_sha256: str
    num_processes: int
    skipped_in_a_row: int = 0

    def differences(self, new: TrainState, *, random_drawn: bool) -> list[Difference]:
        """What makes going on as `new` another training.

        Args:
            random_drawn: whether training draws random numbers, which belong to a number of processes. Everything else
                is the same for any number, but for the last bits of sums.
        """
        stored = self.decides | {"training-tokens": self.data_sha256, "processes": self.num_processes}
        asked = new.decides | {"training-tokens": new.data_sha256, "processes": new.num_processes}
        return [d for d in differences(stored, asked) if d.key != "processes" or random_drawn]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read."""

    folder: Path
    state: TrainState
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random_states: dict[str, Tensor]
    stream_state: dict[str, Any] | None = None
    monitors: dict[str, Any] = field(default_factory=dict)


def checkpoint_path(folder: Path, step: int) -> Path:
    """`folder/step-000200`."""
    return folder / f"step-{step:06d}"


def save_checkpoint(
    folder: Path,
    state: TrainState,
    adapter: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    random_states: dict[str, Tensor],
    keep: int,
    stream_state: dict[str, Any] | None = None,
    monitors: dict[str, Any] | None = None,
    best_step: int | None = None,
) -> Path:
    """Write a checkpoint, then remove the oldest beyond `keep`; that of `best_step` stays besides.

    Later steps are removed as well: training went on from before them because they are damaged, and counted among the
    kept ones they would displace whole checkpoints.

    Raises:
        ResourceError: the disk is full; older checkpoints are untouched.
    """
    path = checkpoint_path(folder, state.step)
    folder.mkdir(parents=True, exist_ok=True)
    with tensor_write_errors(path), directory_atomic(path, replace=True) as partial:
        write_tensors(partial / "adapter.safetensors", adapter)
        write_tensors(partial / "optimizer.safetensors", optimizer)
        write_tensors(partial / "random.safetensors", random_states)
        write_json_atomic(partial / "state.json", asdict(state))
        if stream_state is not None:
            write_json_atomic(partial / "stream.json", stream_state)
        if monitors:
            write_json_atomic(partial / "monitors.json", monitors)
        write_manifest(partial)
    folders = _checkpoint_folders(folder)
    newest = folders.index(path) + 1
    best = None if best_step is None else checkpoint_path(folder, best_step)
    for old in [*folders[: max(newest - keep, 0)], *folders[newest:]]:
        if old != best:
            shutil.rmtree(old)
    return path


def _checkpoint_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose checksums hold, and a message for every damaged one that was passed over."""
    messages: list[str] = []
    if folder.is_dir():
        remove_partials(folder)
    for path in reversed(_checkpoint_folders(folder)):
        try:
            return read_checkpoint(path), messages
        except ArtefactError as error:
            messages.append(f"skipped a damaged checkpoint: {error}")
    return None, messages


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose checksums hold.

    Raises:
        ArtefactError: it is damaged, or another version's.
    """
    verify_manifest(path)
    try:
        state = TrainState(**read_json(path / "state.json"))
    except TypeError as error:
        raise ArtefactError(f"not a checkpoint's state ({error})", where=str(path / "state.json")) from error
    return Checkpoint(
        path,
        state,
        read_tensors(path / "adapter.safetensors"),
        read_tensors(path / "optimizer.safetensors"),
        read_tensors(path / "random.safetensors"),
        read_json(path / "stream.json") if (path / "stream.json").exists() else None,
        read_json(path / "monitors.json") if (path / "monitors.json").exists() else {},
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as flat tensors named `index.key` (safetensors holds no Python objects, which is the point).

    Python integers, bitsandbytes' count of steps, become scalars of int64, which no optimizer of torch has. Shared
    state is put together: all processes call this, and a checkpoint looks the same however many there were.
    """
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.tensor(value) if isinstance(value, int) else _own(value)
        for index, entry in state.items()
        for key, value in {**entry, **entry.get(_WRAPPED, {})}.items()
        if key != _WRAPPED
    }


def _own(value: Tensor) -> Tensor:
    # A copy: parameters share bitsandbytes' quantisation maps, and safetensors refuses what shares memory.
    return whole(value).clone()


def set_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The way back; hyperparameters stay those of `optimizer`."""
    stored: dict[int, dict[str, Tensor | int]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        is_integer = tensor.dtype == torch.int64 and tensor.ndim == 0
        value = int(tensor.item()) if is_integer else share_like(tensor, parameters[int(index)])
        stored.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": stored, "param_groups": optimizer.state_dict()["param_groups"]})
