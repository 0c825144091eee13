"""The largest step of a run, tried before the first one: does it fit, how long does it take, what did it need?

It is the step that training runs, on the prepared model, with a window as long as any that will come. Nothing is
changed by it: parameters, moments, random state and the order of the data are to the bit what they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ctxext.data.packing import PackedWindow
from ctxext.files import format_bytes
from ctxext.model.host_memory import ResidentPeak

PROBE_NAME = "probe.json"
# On an accelerator the first pass also loads and chooses kernels; a short one is therefore timed once more.
_TIMED_TWICE_SECONDS = 20.0

# Runs one step with these windows and this optimizer.
RunStep = Callable[[Any, list[PackedWindow]], object]


@dataclass(frozen=True)
class ProbeShape:
    """The largest pass of a run, and how many of them are a step.

    Attributes:
        windows: of one process's pass.
        window_tokens: of each.
        isolated: two documents a window, which do not see each other.
        passes: of one process in a step.
        windows_per_step: of all processes.
    """

    windows: int
    window_tokens: int
    isolated: bool
    passes: int
    windows_per_step: int

    def rows(self) -> list[PackedWindow]:
        """Windows of this shape; of what they say no size and no time depends."""
        half = self.window_tokens // 2 if self.isolated else self.window_tokens
        positions = [*range(half), *range(self.window_tokens - half)]
        return [PackedWindow([0] * self.window_tokens, positions, [0], 0) for _ in range(self.windows)]


@dataclass(frozen=True)
class Probe:
    """What the largest pass took.

    Attributes:
        seconds: of one pass, forward, backward and update.
        step_seconds: what a step will take: as many passes as it accumulates.
        tokens_per_second: of a step, all processes together.
        measured_bytes: the peak, weights included; None where it cannot be measured.
        measured_as: how.
        traced_bytes: the same by the trace; None where it was not traced.
        attention: of one layer, beside eager attention; None where it was not compared.
        notes: what could be had for less.
    """

    windows: int
    window_tokens: int
    seconds: float
    step_seconds: float
    tokens_per_second: float
    measured_bytes: int | None
    measured_as: str
    traced_bytes: int | None = None
    attention: str | None = None
    notes: list[str] = field(default_factory=list)

    def lasting(self, seconds: float) -> Probe:
        """The same pass with another time."""
        change = seconds / self.seconds
        return replace(
            self,
            seconds=seconds,
            step_seconds=self.step_seconds * change,
            tokens_per_second=self.tokens_per_second / change,
        )

    def to_json(self) -> dict[str, Any]:
        """For `probe.json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        memory = []
        if self.measured_bytes is not None:
            memory.append(f"peak {format_bytes(self.measured_bytes)} ({self.measured_as})")
        if self.traced_bytes is not None:
            memory.append(f"traced {format_bytes(self.traced_bytes)}")
        took = f"{self.seconds:.2f} s a pass, {self.step_seconds:.2f} s a step, {self.tokens_per_second:,.0f} tokens/s"
        shape = f"{self.windows} x {self.window_tokens:,} tokens"
        return [
            f"largest step, tried before the first: {shape}, {', '.join([took, *memory])}",
            *([f"attention: {self.attention}"] if self.attention else []),
            *self.notes,
        ]


def probe_step(
    run: RunStep, model: nn.Module, optimizer: torch.optim.Optimizer, shape: ProbeShape, device: torch.device
) -> Probe:
    """Run the largest pass once and leave everything as it was.

    Args:
        run: a step as training runs it.
        model: prepared; its parameters have no gradients.
        optimizer: the prepared one.

    Raises:
        torch.OutOfMemoryError, RuntimeError: it does not fit; everything is as it was.
    """
    rows, steps = shape.rows(), _Unchanging(model, optimizer)
    peak = _Peak(model, optimizer, device)
    with random_state_kept(device), steps.undone():
        peak.start()
        seconds = _timed(run, steps, rows, shape, device)
        measured = peak.bytes()
        if device.type != "cpu" and seconds < _TIMED_TWICE_SECONDS:
            seconds = _timed(run, steps, rows, shape, device)
    step_seconds = seconds * shape.passes
    tokens = shape.windows_per_step * (shape.window_tokens - 1)
    return Probe(
        windows=shape.windows,
        window_tokens=shape.window_tokens,
        seconds=seconds,
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        measured_bytes=measured,
        measured_as=peak.how,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on a CPU PyTorch raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def _timed(
    run: RunStep, steps: _Unchanging, rows: list[PackedWindow], shape: ProbeShape, device: torch.device
) -> float:
    steps.prepare(accumulating=shape.passes > 1)
    _synchronize(device)
    started = time.perf_counter()
    run(steps, rows)
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _Unchanging:
    """The optimizer with a step that makes its moments and takes its time, and moves nothing.

    With gradients and a rate of zero the update of AdamW adds -0.0 to every weight, which changes no bit of it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = optimizer
        self._had_moments = bool(optimizer.state)

    def prepare(self, accumulating: bool) -> None:
        """Before a pass: a step of several passes holds gradients while the later ones run."""
        for parameter in self._trained if accumulating else []:
            parameter.grad = torch.zeros_like(parameter)

    def step(self) -> None:
        """What `run_step` calls instead of the optimizer's own."""
        for parameter in self._trained:
            if parameter.grad is not None:
                parameter.grad.zero_()
        if not self._had_moments:  # moments of a resumed run would fade
            self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's own."""
        self._optimizer.zero_grad(set_to_none=set_to_none)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Learning rates, moments and gradients are put back."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        try:
            yield
        finally:
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            if not self._had_moments:
                self._optimizer.state.clear()
            self._optimizer.zero_grad(set_to_none=True)


class _Peak:
    """The highest point of memory: the allocator's own count on CUDA, resident pages on the CPU."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._device = device
        self.how = "allocated" if device.type == "cuda" else "resident, without the program's own"
        state = [value for values in optimizer.state.values() for value in values.values()]
        tensors = [*model.parameters(), *model.buffers(), *(value for value in state if isinstance(value, Tensor))]
        self._held = sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_meta)
        self._resident = ResidentPeak()

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._device.type == "cpu":
            self._resident.start()

    def bytes(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        growth = self._resident.growth_bytes() if self._device.type == "cpu" else None
        return None if growth is None else self._held + growth


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Random numbers go on behind the context as if it had drawn none."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
