"""Ctrl-C, SIGTERM and a time limit: finish the step, save, then stop. A second signal stops at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from ctxext.errors import InterruptedRunError
from ctxext.evaluation.sharding import Processes

# What processes tell each other; signals have their own numbers, which are larger.
_GO_ON, _OUT_OF_TIME = 0, 1
# Ctrl-C reaches a process that was launched twice: from the terminal, and from the launcher that passes it on.
_ECHO_SECONDS = 0.5
_MARGIN_SHARE, _MARGIN_SECONDS = 0.02, 60.0
_PACE_SLACK = 1.2


class StopRequest:
    """Remembers the first SIGINT or SIGTERM while the `with` block runs, and when the time is up.

    `check` is called wherever stopping is safe, `agree` where all processes are. Time is up when what lay between two
    such places so far, the longest of it, would no longer end before the limit; a margin (2% of the limit, at most a
    minute) is left for the last save.

    Args:
        max_seconds: the limit, from `started` on; None for none.
        started: by `time.monotonic()`; now when left out.
    """

    def __init__(self, max_seconds: float | None = None, started: float | None = None) -> None:
        self.signal_number: int | None = None
        self._max_seconds = max_seconds
        self._started = time.monotonic() if started is None else started
        self._out_of_time = False
        self._signalled_at = 0.0
        self._last_place: float | None = None
        self._longest = 0.0
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
        if self.signal_number is None:
            self.signal_number, self._signalled_at = number, time.monotonic()
        elif time.monotonic() - self._signalled_at > _ECHO_SECONDS:
            os._exit(128 + number)

    def new_pace(self) -> None:
        """Forget how long things took: others begin."""
        self._last_place, self._longest = None, 0.0

    @property
    def requested(self) -> bool:
        """Whether a signal has come or the time is up; every call is a place where stopping is safe."""
        now = time.monotonic()
        if self._last_place is not None:
            self._longest = max(self._longest, now - self._last_place)
        self._last_place = now
        if self._max_seconds is not None and not self._out_of_time:
            margin = min(_MARGIN_SHARE * self._max_seconds, _MARGIN_SECONDS)
            left = self._started + self._max_seconds - now
            self._out_of_time = left < _PACE_SLACK * self._longest + margin
        return self._out_of_time or self.signal_number is not None

    def agree(self, processes: Processes) -> bool:
        """Whether any process is to stop; then all of them are, for the same reason. All must call it.

        Raises:
            ResourceError: another process is gone.
        """
        code = (self.signal_number or _OUT_OF_TIME) if self.requested else _GO_ON
        agreed = processes.largest(code)
        if agreed == _OUT_OF_TIME:
            self._out_of_time = True
        elif agreed != _GO_ON:
            self.signal_number = agreed
        return agreed != _GO_ON

    def check(self, saved: str) -> None:
        """Raise when it is time to stop.

        Args:
            saved: what is safe on disk by now, for the message.

        Raises:
            InterruptedRunError: with the signal's exit code, or that of a time limit.
        """
        if not self.requested:
            return
        name = signal.Signals(self.signal_number).name if self.signal_number else self._limit()
        raise InterruptedRunError(
            f"stopped by {name}; {saved}",
            signal_number=self.signal_number,
            hint="Run the same command again to go on.",
        )

    def _limit(self) -> str:
        assert self._max_seconds is not None
        return f"train.max_hours ({self._max_seconds / 3600:g} h)"
