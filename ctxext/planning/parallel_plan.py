"""What a recipe's `parallel` block becomes, and why it cannot: before any weight is loaded or process started."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ctxext.errors import UsageError
from ctxext.model.load import choose_device, load_config, resolve_source
from ctxext.planning.memory import Objective, Sharding
from ctxext.planning.memory_plan import fits_one_device
from ctxext.recipe.schema import Recipe
from ctxext.rope.families import text_config


@dataclass(frozen=True)
class ParallelPlan:
    """How the processes of a run share it.

    Processes that follow one another share a window: ranks 0 and 1, then 2 and 3, for `sequence` 2.

    Attributes:
        processes: all of them, over all machines.
        sharded: weights, gradients and optimizer are shared (FSDP2); else every process has all of them (DDP).
        sequence: processes that share one window's tokens.
        engine: how those attend to one another's tokens; None for one.
        windows: that one group of them computes in a step.
        passes: in which they do.
        reason: why the weights are shared or not.
    """

    processes: int = 1
    sharded: bool = False
    sequence: int = 1
    engine: str | None = None
    windows: int = 1
    passes: int = 1
    reason: str = "one process"

    @property
    def replicas(self) -> int:
        """Groups of processes that compute different windows."""
        return self.processes // self.sequence

    @property
    def sharding(self) -> Sharding:
        """For the memory plan."""
        return Sharding(weights=self.processes if self.sharded else 1, sequence=self.sequence)

    def describe(self) -> str:
        """In words."""
        if self.processes == 1:
            return "one process"
        weights = "weights shared (FSDP2)" if self.sharded else "all weights in every process (DDP)"
        words = [f"{self.processes} processes", f"{weights}: {self.reason}"]
        if self.sequence > 1:
            words.append(f"groups of {self.sequence} share a window ({self.engine})")
        taker = "group" if self.sequence > 1 else "process"
        passes = f"{self.passes} passes" if self.passes > 1 else "one pass"
        words.append(f"a step is {self.windows} windows for every {taker}, in {passes}")
        return "; ".join(words)

    def to_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return asdict(self)


def launched_processes() -> int:
    """How many processes the launcher says there are; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def plan_parallel(recipe: Recipe, objective: Objective) -> ParallelPlan:
    """Derive everything; reads the model's config and no weights.

    Args:
        objective: makes the loss module of a model with its adapter; traced where `shard: auto` has to know whether
            the weights fit.

    Raises:
        UsageError: the combination is impossible.
    """
    check_parallel(recipe)
    block, train = recipe.parallel, recipe.train
    processes = num_processes(recipe)
    windows = train.windows_per_step // (processes // block.sequence)
    sharded, reason = _sharding(recipe, processes, objective)
    return ParallelPlan(
        processes=processes,
        sharded=sharded,
        sequence=block.sequence,
        engine=block.sequence_engine if block.sequence > 1 else None,
        windows=windows,
        passes=windows // train.windows_per_device,
        reason=reason,
    )


def num_processes(recipe: Recipe) -> int:
    """What the recipe says, else what the launcher says."""
    asked = recipe.parallel.processes
    return launched_processes() if asked == "auto" else asked


def check_parallel(recipe: Recipe) -> None:
    """Refuse what cannot work.

    Raises:
        UsageError: with the first reason.
    """
    processes = num_processes(recipe)
    for refused in (_wrong_shares(recipe, processes), _wrong_sharding(recipe, processes), _wrong_sequence(recipe)):
        for error in refused:
            raise error


def _wrong_shares(recipe: Recipe, processes: int) -> Iterator[UsageError]:
    train, sequence = recipe.train, recipe.parallel.sequence
    if processes % sequence:
        yield UsageError(
            "the processes cannot be divided into groups that share a window",
            where="parallel.sequence",
            got=sequence,
            expected=f"a divisor of the {processes} processes",
            hint="parallel.processes says how many there are; `auto` is what the launcher starts.",
        )
        return
    unit = processes // sequence * train.windows_per_device
    if train.windows_per_step % unit:
        yield UsageError(
            "train.windows_per_step must be a multiple of processes x windows_per_device"
            + (" / sequence" if sequence > 1 else ""),
            where="train.windows_per_step",
            got=train.windows_per_step,
            expected=f"a multiple of {unit}",
        )


def _wrong_sharding(recipe: Recipe, processes: int) -> Iterator[UsageError]:
    if recipe.parallel.shard != "fsdp2":
        return
    if processes == 1:
        yield _refused("parallel.shard", "fsdp2", "there is one process, with nobody to share weights with")
    if recipe.train.optimizer == "adamw-8bit":
        yield _refused("parallel.shard", "fsdp2", "bitsandbytes' 8-bit moments cannot be divided; use optimizer: adamw")
    if recipe.train.compile:
        yield _refused("parallel.shard", "fsdp2", "train.compile with shared weights is not built")
    if recipe.train.evaluate is not None:
        yield _refused("parallel.shard", "fsdp2", "train.evaluate needs a process that holds all weights")
    if recipe.adaptation == "qlora" and recipe.lora.weight_decomposed:
        why = "lora.weight_decomposed starts from 4-bit weights, which only the process that reads them has"
        yield _refused("parallel.shard", "fsdp2", why)


def _wrong_sequence(recipe: Recipe) -> Iterator[UsageError]:
    block = recipe.parallel
    size, engine = block.sequence, block.sequence_engine
    if size == 1:
        return
    where, got = "parallel.sequence", str(size)
    text = text_config(load_config(resolve_source(recipe.model.source, recipe.model.revision)))
    tokens = recipe.data.windows.length or recipe.target_length
    if tokens % size:
        yield _refused(where, got, f"windows of {tokens} tokens cannot be divided by it")
    if engine == "ulysses":
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(text, name, None) or text.num_attention_heads
            if heads % size:
                yield _refused(where, got, f"ulysses exchanges heads, and {name} is {heads}: it must be a multiple")
    for what in _beyond_plain_attention(text):
        yield _refused(where, got, f"the model has {what}, which no engine here computes across processes")
    if recipe.data.windows.positions == "per-document":
        yield _refused(where, got, "documents that see only themselves (positions: per-document) are not divided")
    if recipe.train.compile:
        yield _refused(where, got, "train.compile with exchanged heads is not built")
    if recipe.train.memory.device_gib is not None:
        return  # planned for another machine
    if importlib.util.find_spec("ringmaster") is None:
        yield _refused(where, got, "it needs the package axolotl-ringmaster; pip install 'ctxext[sequence]'")
    if engine == "ring" and choose_device().type == "cpu" and not recipe.train.allow_slow:
        yield _refused(where, got, "on a CPU the ring computes every score in memory; train.allow_slow=true allows it")
    if engine == "ring" and choose_device().type == "cuda" and not _has_flash_attention():
        yield _refused(where, got, "the ring needs the package flash-attn (or a kernel of it) beside ringmaster")


def _has_flash_attention() -> bool:
    from transformers.utils.import_utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def _beyond_plain_attention(text: Any) -> Iterator[str]:
    """What changes the scores or masks of an attention layer."""
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    sliding = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    if kinds - {"full_attention"} or (sliding and getattr(text, "layer_types", None) is None):
        yield "layers of another kind than full attention"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        yield "soft-capped attention"
    if getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None):
        yield "experts whose routers are judged over a whole window"


def _refused(where: str, got: str, why: str) -> UsageError:
    return UsageError(f"cannot be done here: {why}", where=where, got=got)


def _sharding(recipe: Recipe, processes: int, objective: Objective) -> tuple[bool, str]:
    """Whether weights are shared, and why."""
    asked = recipe.parallel.shard
    if asked != "auto":
        return asked == "fsdp2", "as asked"
    if processes == 1:
        return False, "one process"
    if recipe.train.memory.device_gib is None and choose_device().type == "cpu":
        return False, "processes on a CPU share its memory"
    if fits_one_device(recipe, objective, Sharding(sequence=recipe.parallel.sequence)):
        return False, "they fit"
    for error in _wrong_sharding(_with_shards(recipe), processes):
        raise error
    return True, "they do not fit one device"


def _with_shards(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"shard": "fsdp2"})})
