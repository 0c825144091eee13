"""How several processes share the work: `parallel` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctxext.recipe.base import Block, PositiveInt


class ParallelBlock(Block):
    """Processes, one a device.

    Attributes:
        processes: how many; `auto` is every visible GPU, or one process on a CPU. Under a launcher (torchrun,
            `accelerate launch`, Slurm) the launcher decides, and a number here must agree with it.
        shard: who holds the weights: `none` (every process all of them, DDP), `fsdp2` (shared, gathered layer by
            layer); `auto` is `none` where they fit.
        sequence: processes that share one window's tokens.
        sequence_engine: how they attend to one another's: `ulysses` (heads are exchanged, Jacobs et al. 2023,
            arXiv:2309.14509) or `ring` (keys and values go round, Liu et al. 2023, arXiv:2310.01889).
    """

    processes: Literal["auto"] | PositiveInt = "auto"
    shard: Literal["auto", "none", "fsdp2"] = "auto"
    sequence: PositiveInt = 1
    sequence_engine: Literal["ulysses", "ring"] = "ulysses"

    @model_validator(mode="after")
    def _groups_divide_the_processes(self) -> ParallelBlock:
        if self.processes == "auto":
            return self
        if self.processes % self.sequence:
            raise ValueError(
                f"parallel.sequence: groups of {self.sequence} processes cannot be made of {self.processes}"
            )
        if self.shard == "fsdp2" and self.processes == 1:
            raise ValueError("parallel.shard: fsdp2 shares weights among processes, and parallel.processes is 1")
        return self
