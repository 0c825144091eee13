"""One evaluation in several processes, as `torchrun` or `accelerate launch` start them.

Units of work are never taken apart: prompts that are answered together, along a trunk or in a batch, stay together in
one process, so what is stored is what a single process stores. The processes need a common folder and meet only at the
beginning and at the end; whoever is ready waits however long the others take.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from ctxext.errors import ResourceError

T = TypeVar("T")

# Gloo's half hour and NCCL's ten minutes are for steps of a training; here the shares may differ by hours.
_PATIENCE = timedelta(days=7)
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Processes:
    """This process among those that share an evaluation.

    Attributes:
        index: 0 for the main process, the only one that tells people anything.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and gathers."""
        return self.index == 0

    def wait(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Until all processes are here.

        Args:
            meanwhile: called again and again; may raise to end the waiting.

        Raises:
            ResourceError: another process ended before.
        """
        if self.count == 1:
            return
        with _while_all_live():
            barrier = dist.barrier(group=_talk(), async_op=True)
        while not barrier.is_completed():
            if meanwhile is not None:
                meanwhile()
            time.sleep(_POLL_SECONDS)
        with _while_all_live():
            barrier.wait()

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns in the main process, in all of them.

        Raises:
            ResourceError: the main process ended before.
        """
        if self.count == 1:
            return make()
        box: list[Any] = [make() if self.is_main else None]
        with _while_all_live():
            dist.broadcast_object_list(box, src=0, group=_talk())
        found: T = box[0]
        return found

    def gathered(self, value: T) -> list[T]:
        """The values of all processes by index.

        Raises:
            ResourceError: another process ended before.
        """
        if self.count == 1:
            return [value]
        box: list[Any] = [None] * self.count
        with _while_all_live():
            dist.all_gather_object(box, value, group=_talk())
        return box

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers, in all of them; devices are not waited for.

        Raises:
            ResourceError: another process ended before.
        """
        if self.count == 1:
            return number
        box = torch.tensor(number)
        with _while_all_live():
            dist.all_reduce(box, dist.ReduceOp.MAX, group=_talk())
        return int(box)


ALONE = Processes()


def this_launch() -> Processes:
    """The processes that the launcher started, this one among them. Sets the device of this process.

    Call it before a model is loaded onto `cuda`.

    Raises:
        ResourceError: a launcher asked for several processes, and there is only this one.
    """
    require_all_processes()
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1 and not PartialState._shared_state:
        return ALONE
    try:
        state = PartialState(cpu=not torch.cuda.is_available())
    except ValueError as error:  # several processes and nobody who says where they meet
        PartialState._reset_state()
        raise _alone_against(asked) from error
    if state.num_processes != asked:
        raise _alone_against(asked)
    return Processes(state.process_index, state.num_processes)


def require_all_processes() -> None:
    """`accelerate launch --cpu --num_processes 2` says where two processes would meet, and starts one.

    Raises:
        ResourceError: that is how this process was started.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise _alone_against("several")


def _alone_against(asked: int | str) -> ResourceError:
    return ResourceError(
        "the launcher asked for several processes, but Accelerate runs as one",
        where="WORLD_SIZE",
        got=asked,
        expected="a launcher that starts as many as it is asked for",
        hint="On CPU, start with torchrun; accelerate launch --cpu runs one process.",
    )


def owners(costs: Sequence[float], num_processes: int) -> list[int]:
    """Which process takes each unit: the dearest first, each to whoever has least to do so far."""
    loads = [(0.0, index) for index in range(num_processes)]
    owner = [0] * len(costs)
    for unit in sorted(range(len(costs)), key=lambda unit: -costs[unit]):
        load, index = heapq.heappop(loads)
        owner[unit] = index
        heapq.heappush(loads, (load + costs[unit], index))
    return owner


@cache
def _talk() -> Any:
    """A group of its own for small messages between CPUs, whatever the training talks with."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def _while_all_live() -> Iterator[None]:
    """Around talk with the other processes and nothing else: what fails there is that one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise another_ended() from error


def another_ended() -> ResourceError:
    """What every process says that notices it, wherever it does."""
    return ResourceError(
        "another process of this run ended before its share was done",
        where=f"process {os.environ.get('RANK', '0')}",
        hint="Its own message says why. Finished samples and checkpoints are saved; the same command goes on.",
    )
