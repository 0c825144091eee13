"""Before step 0: the largest step on this machine beside what the trace says; refuses settings that cost too much."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedConfig

from ctxext.errors import ResourceError
from ctxext.files import format_bytes
from ctxext.model.attention_choice import AttentionHost, attention_of
from ctxext.model.savings import Savings, savings_of, without_savings
from ctxext.planning.attention_gain import AttentionGain, eager_comparison
from ctxext.planning.memory_plan import advice_when_out_of_memory, traced_step
from ctxext.planning.parallel_plan import ParallelPlan
from ctxext.recipe.schema import Recipe
from ctxext.train.probe import Probe, ProbeShape, RunStep, is_out_of_memory, probe_step, random_state_kept
from ctxext.train.step import SummedLoss

# A setting may cost this share of the throughput without being allowed by name.
_TOLERATED_COST = 0.3
# Times of shorter passes are too uncertain to refuse anything for, and too short to matter.
_JUDGED_FROM_SECONDS = 1.0
# A step without savings is tried where the trace leaves this much room for what it does not see.
_ROOM = 0.85


@dataclass(frozen=True)
class Prepared:
    """A training that is ready to start.

    Attributes:
        run: a step as training runs it.
        model: as Accelerate prepared it.
        adapted: the model with its adapter, unwrapped.
        config: the extended config.
        dtype: that attention computes in.
        parallel: how the processes share the work.
    """

    accelerator: Accelerator
    run: RunStep
    model: nn.Module
    adapted: nn.Module
    optimizer: torch.optim.Optimizer
    config: PreTrainedConfig
    dtype: torch.dtype
    parallel: ParallelPlan

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self.accelerator.device
        return device

    def probe(self, shape: ProbeShape) -> Probe:
        """One probed step; all processes get the slowest one's time, so that they judge alike."""
        probe = probe_step(self.run, self.model, self.optimizer, shape, self.device)
        mine = torch.tensor([probe.seconds], dtype=torch.float64, device=self.device)
        return probe.lasting(float(self.accelerator.gather(mine).max()))

    def agree(self, flag: bool) -> bool:
        """Whether it is so on every process."""
        mine = torch.tensor([int(flag)], device=self.device)
        return bool(self.accelerator.gather(mine).min())


def largest_pass(recipe: Recipe, parallel: ParallelPlan) -> ProbeShape:
    """The shape of a recipe's largest pass."""
    return ProbeShape(
        windows=recipe.train.windows_per_device,
        window_tokens=recipe.data.windows.length or recipe.target_length,
        isolated=recipe.data.windows.positions == "per-document",
        passes=parallel.passes,
        windows_per_step=recipe.train.windows_per_step,
    )


def try_worst_case(prepared: Prepared, recipe: Recipe) -> Probe:
    """Probe the largest step, compare it with the trace, and refuse settings that cost too much of the speed.

    Raises:
        ResourceError: out of memory, with what to change in order; or a setting that costs more than 30% of the speed
            and saves nothing that is needed, without train.allow_slow.
    """
    with random_state_kept(prepared.device):  # traces and comparisons seed what they make
        return _try(prepared, recipe, largest_pass(recipe, prepared.parallel))


def _try(prepared: Prepared, recipe: Recipe, shape: ProbeShape) -> Probe:
    try:
        if recipe.train.compile:
            prepared.probe(shape)  # compiles
        probe = prepared.probe(shape)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        words = str(error).splitlines()[0]
    else:
        return _judged(prepared, recipe, shape, probe)
    gc.collect()  # what the failed step still held
    raise _too_large(prepared, recipe, shape, words)


def _judged(prepared: Prepared, recipe: Recipe, shape: ProbeShape, probe: Probe) -> Probe:
    notes = []
    if prepared.device.type == "cuda":  # on a CPU, tracing takes as long as a short step
        savings = savings_of(recipe.train, shape.window_tokens)
        probe = replace(probe, traced_bytes=_traced_bytes(prepared, recipe, savings))
        notes += list(_needless(prepared, recipe, savings))
    if probe.seconds < _JUDGED_FROM_SECONDS:
        return replace(probe, notes=notes)
    attention = _attention(prepared, recipe, shape)
    _refuse_dear_savings(prepared, recipe, shape, probe)
    return replace(probe, attention=attention, notes=notes)


def _too_large(prepared: Prepared, recipe: Recipe, shape: ProbeShape, words: str) -> ResourceError:
    device = prepared.device
    advice = advice_when_out_of_memory(recipe, SummedLoss, prepared.parallel.sharding)
    steps = " ".join(f"{number}. {line}." for number, line in enumerate(advice, start=1))
    in_use = f", {format_bytes(torch.cuda.max_memory_allocated(device))} were in use" if device.type == "cuda" else ""
    return ResourceError(
        "the largest step of this training does not fit into memory; nothing was trained yet",
        where="train",
        got=f"{shape.windows} x {shape.window_tokens:,} tokens in one pass{in_use} ({words})",
        hint=f"In this order, each on top of those before, as the trace sees it: {steps}"
        if advice
        else "Use shorter windows or a smaller model.",
    )


def _traced_bytes(prepared: Prepared, recipe: Recipe, savings: Savings) -> int | None:
    memory = traced_step(recipe, SummedLoss, savings, prepared.parallel.sharding)
    return memory.peak_bytes if memory is not None else None


def _attention(prepared: Prepared, recipe: Recipe, shape: ProbeShape) -> str:
    choice = attention_of(recipe, prepared.config, AttentionHost.of(prepared.device), prepared.dtype)

    def measured() -> AttentionGain:
        return eager_comparison(
            prepared.config,
            prepared.device,
            prepared.dtype,
            choice,
            window_tokens=shape.window_tokens,
            isolated=shape.isolated,
        )

    gain = measured()
    if gain.cost[1] > _TOLERATED_COST:
        gain = measured()  # other programs may have slowed one of the two down
    gain.require_worthwhile(recipe.train.allow_slow)
    return gain.describe()


def _asked_for(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Settings of this recipe that trade speed for memory, and their opposites; not what `auto` chooses."""
    train = recipe.train
    if train.activation_checkpointing is True:
        yield "train.activation_checkpointing=true", "train.activation_checkpointing=false"
    if train.memory.offload:
        yield "train.memory.offload=true", "train.memory.offload=false"
    if isinstance(train.memory.tile_tokens, int):
        yield f"train.memory.tile_tokens={train.memory.tile_tokens}", "train.memory.tile_tokens=off"


def _needless(prepared: Prepared, recipe: Recipe, savings: Savings) -> Iterator[str]:
    """What `auto` turned on although the step fits without: it goes by the length alone."""
    if savings.checkpoint_every is None or recipe.train.activation_checkpointing is True:
        return
    plain = _traced_bytes(prepared, recipe, Savings(tile_tokens=savings.tile_tokens))
    available = _memory_of(prepared.device)
    if plain is not None and plain <= _ROOM * available:
        yield (
            f"without activation checkpointing, which auto turned on for the length, the step would peak at "
            f"{format_bytes(plain)} of {format_bytes(available)}: train.activation_checkpointing=false is faster"
        )


def _refuse_dear_savings(prepared: Prepared, recipe: Recipe, shape: ProbeShape, probe: Probe) -> None:
    asked = dict(_asked_for(recipe))
    if not asked or recipe.train.allow_slow or prepared.device.type not in ("cpu", "cuda"):
        return
    plain, available = _traced_bytes(prepared, recipe, Savings()), _memory_of(prepared.device)
    fits = plain is not None and plain <= _ROOM * available
    if plain is None or not prepared.agree(fits):
        return
    with without_savings(prepared.adapted, savings_of(recipe.train, shape.window_tokens)):
        without = prepared.probe(shape).seconds
    # Once more: other programs may have slowed the first one down.
    seconds = min(probe.seconds, prepared.probe(shape).seconds)
    cost = 1 - without / seconds
    if cost > _TOLERATED_COST:
        raise ResourceError(
            f"{' and '.join(asked)}: costs {cost:.0%} of the speed here, and the step fits without",
            where=next(iter(asked)).split("=")[0],
            got=f"{seconds:.2f} s a pass, {without:.2f} s without",
            expected=f"at most {_TOLERATED_COST:.0%}; the trace without: {format_bytes(plain)}, available: "
            f"{format_bytes(available)}",
            hint=f"Use {' '.join(asked.values())}; train.allow_slow=true trains all the same.",
        )


def _memory_of(device: torch.device) -> int:
    """What a training may use: what is free, and what it holds already."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
