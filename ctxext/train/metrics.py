"""`metrics.jsonl`: one line a step, and one for everything that a monitor has to say about it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctxext.files import append_json_line, canonical_json, read_json_lines, write_text_atomic

METRICS_NAME = "metrics.jsonl"
# The monitor's name in the lines of evaluations during training.
EVALUATION = "evaluation"


@dataclass(frozen=True)
class StepMetrics:
    """A step's line.

    Attributes:
        step: counted from 1.
        loss: mean over the step's target tokens, of all processes.
        grad_norm: before clipping.
        seconds: of the whole step, data included.
        auxiliary_loss: that of the model's routers, without its coefficient; None for a model that has none. It is in
            the gradient, but not in `loss`.
        skipped: why the step changed nothing; then loss or gradient norm is not finite, and no statistic may hold it.
    """

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    tokens_per_second: float
    seconds: float
    auxiliary_loss: float | None = None
    skipped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The line: what may be missing where it is there, and null for what JSON has no number for."""
        line: dict[str, Any] = _for_json({key: value for key, value in asdict(self).items() if value is not None})
        return line


class MetricsFile:
    """Appends to `metrics.jsonl` of a run folder.

    Lines of monitors are told from those of steps by their key `monitor`.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_NAME

    def add_step(self, metrics: StepMetrics) -> None:
        """A step's line."""
        append_json_line(self._path, metrics.to_json())

    def add_monitor(self, name: str, step: int, line: dict[str, Any]) -> None:
        """A monitor's line."""
        append_json_line(self._path, {"step": step, "monitor": name, **_for_json(line)})

    def keep_up_to(self, step: int) -> None:
        """Drop what is behind `step`, which will be done again; its checkpoint is older than its evaluation."""
        if self._path.exists():
            kept = [
                line
                for line in read_json_lines(self._path)
                if line["step"] < step or (line["step"] == step and line.get("monitor") != EVALUATION)
            ]
            write_text_atomic(self._path, "".join(canonical_json(line) + "\n" for line in kept))


def _for_json(value: Any) -> Any:
    """`value` with null for numbers that are not finite: in a skipped step any of them may be."""
    if isinstance(value, dict):
        return {key: _for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """The lines of the steps, and those of every monitor by its name; empty without a file."""
    path = folder / METRICS_NAME
    steps: list[dict[str, Any]] = []
    monitors: dict[str, list[dict[str, Any]]] = {}
    for line in read_json_lines(path) if path.exists() else []:
        monitors.setdefault(line["monitor"], []).append(line) if "monitor" in line else steps.append(line)
    return steps, monitors
