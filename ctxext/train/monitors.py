"""What watches a training: one small class a thing, called around every step on every process.

A monitor never changes what is trained. What it keeps from step to step goes into checkpoints, so that a resumed run
says what the uninterrupted one would have said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from ctxext.data.packing import PackedWindow
from ctxext.train.metrics import StepMetrics


@dataclass(frozen=True)
class StepEvent:
    """What monitors see of a finished step.

    Attributes:
        windows: this process's share of the step.
        model: the trained model, unwrapped, after the update.
    """

    metrics: StepMetrics
    windows: Sequence[PackedWindow]
    model: nn.Module


class Monitor(Protocol):
    """Watches one thing. Every process calls its methods in the same order, so they may talk to each other.

    Attributes:
        name: of its lines in `metrics.jsonl`, of its state in checkpoints, and in reports.
    """

    name: str

    def before_step(self, step: int, windows: Sequence[PackedWindow]) -> None:
        """Step `step` (from 1) begins with this process's `windows`: the place to start recording inside the model."""

    def after_step(self, event: StepEvent) -> list[dict[str, Any]]:
        """Lines for `metrics.jsonl`, the main process's are written; one with the key `warning` is shown at once."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: JSON values only, equal on every process."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""


@runtime_checkable
class WatchesModel(Protocol):
    """A monitor that records inside the model."""

    def watch(self, model: nn.Module) -> None:
        """Once, before the first step: the model that is trained, unwrapped."""
