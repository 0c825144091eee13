"""What the pipeline tells while it works. The pipeline knows this protocol only; the console draws it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from ctxext.evaluation.run import EvaluationReporter
from ctxext.evaluation.store import SampleResult
from ctxext.evaluation.suite import Sample
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


class Unheard:
    """Says nothing: the reporter of all processes of a launch but the first."""

    def plan(self, plan: Plan, estimated_seconds: float, output_dir: str) -> None:
        """Nothing."""

    def stage(self, number: int, count: int, title: str) -> None:
        """Nothing."""

    def info(self, text: str) -> None:
        """Nothing."""

    def evaluation(self, title: str, samples: list[Sample]) -> AbstractContextManager[Callable[[SampleResult], None]]:
        """Nothing."""
        return nullcontext(lambda result: None)

    def training(self, title: str, steps: int) -> AbstractContextManager[TrainHooks]:
        """Nothing."""
        return nullcontext(TrainHooks(on_start=lambda start: None, on_step=lambda metrics: None))

    def progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Nothing."""
        return nullcontext(lambda done, total: None)
