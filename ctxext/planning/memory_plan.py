"""Does a recipe's training step fit its device, and if not, what to change first: traced, no weights, no guess.

The order of the advice is the order of the price: what costs nothing but accumulation, then recomputation, then copies
to host memory, then shorter windows or more devices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from ctxext.errors import UnsupportedModelError
from ctxext.files import format_bytes
from ctxext.model.attention_choice import planned_attention
from ctxext.model.load import choose_device, choose_dtype, load_config, resolve_source
from ctxext.model.savings import Savings, savings_of
from ctxext.planning.memory import ONE_DEVICE, Objective, Sharding, StepMemory, StepShape, trace_step
from ctxext.recipe.schema import Recipe, TrainBlock
from ctxext.rope.patchers import apply_method

_GIB = 1024**3
# Of a device's memory: the rest goes to the driver's context and to what the allocator cannot use.
_USABLE = 0.93
_ROUND_TOKENS = 1024
# A setting that leaves more than this share of the peak is not worth its price.
_WORTHWHILE = 0.98


@dataclass(frozen=True)
class MemoryPlan:
    """A traced training step beside the device that it is for.

    Attributes:
        traced: the step; None when it cannot be traced.
        why_not: why it cannot be.
        device: whose kernels count: cuda or cpu.
        dtype: of the weights.
        savings: in words.
        available_bytes: memory of the device.
        available_of: what device that is.
        advice: in order; empty when the step fits.
    """

    traced: dict[str, Any] | None
    why_not: str | None
    device: str
    dtype: str
    savings: str
    available_bytes: int
    available_of: str
    advice: list[str]

    def to_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return asdict(self)


@dataclass(frozen=True)
class _Device:
    kind: Literal["cuda", "cpu"]
    dtype: torch.dtype
    num_bytes: int
    name: str


def plan_memory(recipe: Recipe, objective: Objective, sharding: Sharding = ONE_DEVICE) -> MemoryPlan:
    """Trace the recipe's training step and judge it; reads the model's config and no weights.

    Args:
        objective: makes the loss module of a model with its adapter.
    """
    device = _device_of(recipe)
    tracer = _Tracer(recipe, objective, sharding, device)
    words = savings_of(recipe.train, tracer.window_tokens).describe()
    dtype = str(device.dtype).removeprefix("torch.")
    try:
        traced = tracer.trace(recipe.train)
        advice = list(_advice(recipe, tracer, device)) if _exceeds(traced, device) else []
    except UnsupportedModelError as error:
        return MemoryPlan(None, error.what, device.kind, dtype, words, device.num_bytes, device.name, [])
    return MemoryPlan(traced.to_json(), None, device.kind, dtype, words, device.num_bytes, device.name, advice)


def traced_step(
    recipe: Recipe, objective: Objective, savings: Savings, sharding: Sharding = ONE_DEVICE
) -> StepMemory | None:
    """The recipe's step with other savings on this machine; None where it cannot be traced."""
    tracer = _Tracer(recipe, objective, sharding, _device_of(recipe))
    try:
        return tracer.trace_savings(savings, recipe.train.windows_per_device, tracer.window_tokens)
    except UnsupportedModelError:
        return None


def advice_when_out_of_memory(recipe: Recipe, objective: Objective, sharding: Sharding = ONE_DEVICE) -> list[str]:
    """What to change, in order, for a step that ran out of memory, whether or not the trace had said that it fits."""
    device = _device_of(recipe)
    tracer = _Tracer(recipe, objective, sharding, device)
    try:
        needed = tracer.trace(recipe.train)
        # What failed has to become smaller, by as much as the device is really smaller than it was taken for.
        room = min(device.num_bytes, int(_WORTHWHILE * needed.peak_bytes / _USABLE))
        return list(_advice(recipe, tracer, replace(device, num_bytes=room)))
    except UnsupportedModelError:
        return []


def fits_one_device(recipe: Recipe, objective: Objective, sharding: Sharding) -> bool:
    """Whether the traced step leaves room on the device; a step that cannot be traced is taken to fit."""
    device = _device_of(recipe)
    try:
        return not _exceeds(_Tracer(recipe, objective, sharding, device).trace(recipe.train), device)
    except UnsupportedModelError:
        return True


class _Tracer:
    """Steps of one recipe under other settings."""

    def __init__(self, recipe: Recipe, objective: Objective, sharding: Sharding, device: _Device) -> None:
        config = load_config(resolve_source(recipe.model.source, recipe.model.revision))
        self._config = apply_method(config, recipe.rope, recipe.target_length, recipe.on_existing)
        self._recipe, self._objective, self._sharding, self._device = recipe, objective, sharding, device
        self._attention = planned_attention(recipe, self._config).implementation
        self.window_tokens = recipe.data.windows.length or recipe.target_length

    def trace(self, train: TrainBlock, window_tokens: int | None = None) -> StepMemory:
        """The step under other settings."""
        tokens = window_tokens or self.window_tokens
        return self.trace_savings(savings_of(train, self.window_tokens), train.windows_per_device, tokens)

    def trace_savings(self, savings: Savings, windows: int, window_tokens: int) -> StepMemory:
        """The step with these savings."""
        shape = StepShape(windows, window_tokens, self._device.dtype, self._device.kind, self._attention)
        recipe = self._recipe
        return trace_step(
            self._config,
            recipe.lora,
            savings,
            shape,
            self._objective,
            self._sharding,
            recipe.adaptation,
            recipe.train.moment_bytes,
        )


def _device_of(recipe: Recipe) -> _Device:
    asked, found = recipe.train.memory.device_gib, choose_device()
    if asked is not None:
        dtype = torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16
        return _Device("cuda", dtype, int(asked * _GIB), "train.memory.device_gib")
    dtype = choose_dtype(recipe.model.dtype, found)
    if found.type == "cuda":
        properties = torch.cuda.get_device_properties(found)
        return _Device("cuda", dtype, properties.total_memory, properties.name)
    return _Device("cpu", dtype, _physical_memory(), "this machine's memory")


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _exceeds(memory: StepMemory, device: _Device) -> bool:
    total = memory.peak_bytes + (memory.host_bytes if device.kind == "cpu" else 0)
    return total > _USABLE * device.num_bytes


def _advice(recipe: Recipe, tracer: _Tracer, device: _Device) -> Iterator[str]:
    """Settings one after the other, each on top of those before, until the step fits; none that would not help."""
    train = recipe.train
    lowest = tracer.trace(train)
    for change, price in _ladder(recipe, device):
        changed = _with(train, change)
        if changed == train:
            continue
        memory = tracer.trace(changed)
        if memory.peak_bytes > _WORTHWHILE * lowest.peak_bytes:
            continue
        train, lowest = changed, memory
        host = f" and {format_bytes(memory.host_bytes)} of host memory" if memory.host_bytes else ""
        setting = ", ".join(f"{key}={str(value).lower()}" for key, value in change.items())
        fits = not _exceeds(memory, device)
        yield f"{setting}: {format_bytes(memory.peak_bytes)}{host}{', which fits' if fits else ''} ({price})"
        if fits:
            return
    yield from _shorter_windows(train, tracer, device)


def _ladder(recipe: Recipe, device: _Device) -> Iterator[tuple[dict[str, Any], str]]:
    yield {"train.windows_per_device": 1}, "the same steps, accumulated window by window"
    yield {"train.activation_checkpointing": True}, "the forward pass is computed twice"
    yield {"train.memory.checkpoint_every_n_layers": 1}, "every layer is computed twice"
    if recipe.train.memory.tile_tokens in ("auto", "off"):
        yield {"train.memory.tile_tokens": 8192}, "what treats tokens one by one is computed once more"
    if device.kind == "cuda":
        yield {"train.memory.offload": True}, "a copy of every layer's input to the host and back"


def _with(train: TrainBlock, change: dict[str, Any]) -> TrainBlock:
    values = train.model_dump()
    for key, value in change.items():
        *blocks, name = key.split(".")[1:]
        place = values
        for block in blocks:
            place = place[block]
        place[name] = value
    return TrainBlock.model_validate(values)


def _shorter_windows(train: TrainBlock, tracer: _Tracer, device: _Device) -> Iterator[str]:
    """The longest window that fits: beyond its first thousands of tokens, a step's peak is linear in them."""
    tokens = tracer.window_tokens
    peaks = [tracer.trace(train, length).peak_bytes for length in (tokens // 2, tokens)]
    slope = (peaks[1] - peaks[0]) / (tokens - tokens // 2)
    longest = int((_USABLE * device.num_bytes - (peaks[1] - slope * tokens)) / max(slope, 1.0))
    longest -= longest % _ROUND_TOKENS
    if longest >= _ROUND_TOKENS:
        yield (
            f"windows of about {longest:,} tokens would fit (data.windows.mode=skip-wise "
            f"data.windows.length={longest} sees all {tracer.window_tokens:,} positions in them)"
        )
    else:
        yield "no window fits beside the weights: a smaller or quantised base, or weights shared by several devices"


def memory_rows(memory: dict[str, Any]) -> list[tuple[str, str]]:
    """A stored `MemoryPlan` as (name, text) for people."""
    available = f"{memory['available_of']}: {format_bytes(memory['available_bytes'])}"
    if memory["traced"] is None:
        return [("memory", f"{memory['why_not']}; {available}")]
    traced = StepMemory(**memory["traced"])
    split = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in traced.split.items())
    host = f" and {format_bytes(traced.host_bytes)} of host memory" if traced.host_bytes else ""
    verdict = "more than fits; " if memory["advice"] else ""
    return [
        (
            "memory",
            f"a training step peaks at {format_bytes(traced.peak_bytes)}{host} in {memory['dtype']} "
            f"({verdict}{available})",
        ),
        ("", f"{split}; at {traced.operation}, {traced.phase}"),
        ("", memory["savings"]),
        *(("to fit" if number == 0 else "", f"{number + 1}. {line}") for number, line in enumerate(memory["advice"])),
    ]
