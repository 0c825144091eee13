"""What the pipeline tells while it works. The pipeline knows this protocol only; the console draws it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from ctxext.evaluation.run import EvaluationReporter
from ctxext.planning.plan import Plan
from ctxext.train.loop import TrainHooks


class Reporter(EvaluationReporter, Protocol):
    """Shows a run to people."""

    def plan(self, plan: Plan, estimated_seconds: float, output_dir: str) -> None:
        """The plan, before anything happens."""

    def stage(self, number: int, count: int, title: str) -> None:
        """A stage begins."""

    def info(self, text: str) -> None:
        """One line worth knowing."""

    def training(self, title: str, steps: int) -> AbstractContextManager[TrainHooks]:
        """Yields the hooks of a training loop."""

    def progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Yields a function of (done, total) for a long preparation."""
