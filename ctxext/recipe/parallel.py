"""How several processes share the work: `parallel` of a recipe."""

from __future__ import annotations

from typing import Literal

from ctxext.recipe.base import Block, PositiveInt


class ParallelBlock(Block):
    """Processes, one a device.

    Attributes:
        processes: how many; `auto` is every visible GPU, or one process on a CPU. Under a launcher (torchrun,
            `accelerate launch`, Slurm) the launcher decides, and a number here must agree with it.
        shard: who holds the weights: `none` (every process all of them, DDP), `fsdp2` (shared, gathered layer by
            layer); `auto` is `none` where they fit.
        sequence: processes that share one window's tokens.
        sequence_engine: how they attend to one another's: `ulysses` (heads are exchanged) or `ring` (keys and values
            go round).
    """

    processes: Literal["auto"] | PositiveInt = "auto"
    shard: Literal["auto", "none", "fsdp2"] = "auto"
    sequence: PositiveInt = 1
    sequence_engine: Literal["ulysses", "ring"] = "ulysses"
