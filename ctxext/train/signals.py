"""Ctrl-C and SIGTERM: finish the step, save, then stop. A second signal stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from ctxext.errors import InterruptedRunError


class StopRequest:
    """Remembers the first SIGINT or SIGTERM while the `with` block runs; `check` raises where stopping is safe."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may install handlers; elsewhere (a notebook's worker) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)
        self.signal_number = number

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None

    def check(self, saved: str) -> None:
        """Raise when a signal has come.

        Args:
            saved: what is safe on disk by now, for the message.

        Raises:
            InterruptedRunError: with the signal's exit code.
        """
        if self.signal_number is not None:
            name = signal.Signals(self.signal_number).name
            raise InterruptedRunError(
                f"stopped by {name}; {saved}",
                signal_number=self.signal_number,
                hint="Run the same command again to go on.",
            )
