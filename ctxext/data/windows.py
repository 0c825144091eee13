"""What training asks of its data, whether it was packed before (`packing.py`) or is made meanwhile (`streaming.py`)."""

from __future__ import annotations

from typing import Any, Protocol

from ctxext.data.order import Cursor, Share
from ctxext.data.packing import PackedWindow


class TrainingWindows(Protocol):
    """Windows in a reproducible order.

    Attributes:
        length: tokens of a window.
    """

    length: int

    def step_windows(self, cursor: Cursor, count: int, share: Share) -> list[PackedWindow]:
        """One process's share of the `count` windows behind `cursor`."""

    def stream_state(self) -> dict[str, Any] | None:
        """What a checkpoint must hold besides the step; None for nothing."""

    def restore(self, state: dict[str, Any] | None, num_consumed: int) -> None:
        """Go on where `stream_state` was taken, `num_consumed` windows behind the start."""
