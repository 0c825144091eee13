"""Loss spikes: found against a robust baseline, followed until the loss is back, with the likely cause by rule.

The baseline is the median of the last finite losses, its width their median absolute deviation: neither a spike nor a
value that is not finite moves them. Causes, in this order: the gradient norm exploded in the steps before (the update
did the damage), the step's tokens are unlike all before (the data did), or the rate is at its peak (the schedule did).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ctxext.data.packing import PackedWindow
from ctxext.train.monitors import StepEvent
from ctxext.train.token_counts import Anomaly, TokenCounts

_WINDOW = 64
_FEWEST = 8
# Widths above the baseline at which a spike begins, and below which it is over.
_SPIKE_WIDTHS, _CALM_WIDTHS = 6.0, 3.0
# The least width, as a share of the baseline: where losses hardly vary, a hundredth more is no spike.
_LEAST_WIDTH = 0.01
_CALM_STEPS = 3
_SOON_STEPS, _LATEST_STEPS = 50, 200
_STEPS_BEFORE = 3
_EXPLODED = 3.0
_NEAR_PEAK = 0.9


@dataclass
class Spike:
    """A spike that the loss has not come back from.

    Attributes:
        step: at which it began.
        baseline, width: of the losses before it.
        peak: largest loss since.
        calm: steps in a row that are back at the baseline.
    """

    step: int
    baseline: float
    width: float
    peak: float
    calm: int = 0


class SpikeMonitor:
    """Watches the loss of all processes.

    Args:
        peak_rate: the schedule's highest learning rate.
        warmup_steps: steps until it is reached.
        tokens: what tokens there have been, kept over the whole training.
    """

    name = "spikes"

    def __init__(self, peak_rate: float, warmup_steps: int, tokens: TokenCounts) -> None:
        self._peak_rate = peak_rate
        self._warmup_steps = warmup_steps
        self._tokens = tokens
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._spike: Spike | None = None

    def before_step(self, step: int, windows: Sequence[PackedWindow]) -> None:
        """Nothing is recorded inside the model."""

    def after_step(self, event: StepEvent) -> list[dict[str, Any]]:
        """A line where a spike begins, and one where it ends."""
        metrics = event.metrics
        counts = self._tokens.count(event.windows)
        lines: list[dict[str, Any]] = []
        # A step that was skipped has no part in what is normal.
        if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm):
            if self._spike is not None:
                lines = self._follow(metrics.step, metrics.loss)
            else:
                lines = self._look(event, self._tokens.anomalies(counts))
            if self._spike is None:
                self._losses.append(metrics.loss)
            self._norms.append(metrics.grad_norm)
        self._tokens.add(counts)
        return lines

    def _look(self, event: StepEvent, anomalies: list[Anomaly]) -> list[dict[str, Any]]:
        if len(self._losses) < _FEWEST:
            return []
        baseline, width = _level(self._losses)
        loss, step = event.metrics.loss, event.metrics.step
        if loss <= baseline + _SPIKE_WIDTHS * width:
            return []
        self._spike = Spike(step, baseline, width, loss)
        causes = self._causes(step, event.metrics.learning_rate, anomalies)
        cause = causes[0] if causes else {"cause": "unknown", "detail": "no rule names a cause"}
        height = loss - baseline
        return [
            {
                "event": "spike",
                "height": height,
                "baseline": baseline,
                "widths": height / width,
                "causes": causes,
                **cause,
                "warning": f"loss spike of {height:.2f} above {baseline:.2f}; likely cause: {cause['detail']}",
            }
        ]

    def _causes(self, step: int, rate: float, anomalies: list[Anomaly]) -> list[dict[str, Any]]:
        causes: list[dict[str, Any]] = []
        recent, before = list(self._norms)[-_STEPS_BEFORE:], list(self._norms)[:-_STEPS_BEFORE]
        usual = median(before) if before else math.inf
        if max(recent) > _EXPLODED * usual:
            ago = recent[::-1].index(max(recent)) + 1
            causes.append(
                {
                    "cause": "gradient",
                    "detail": f"the gradient norm was {max(recent) / usual:.1f} times its median in step {step - ago}",
                }
            )
        if anomalies:
            named = ", ".join(anomaly.text() for anomaly in anomalies)
            causes.append(
                {
                    "cause": "tokens",
                    "token_ids": [anomaly.token_id for anomaly in anomalies],
                    "detail": f"unusual tokens in the batch: {named}",
                }
            )
        if rate >= _NEAR_PEAK * self._peak_rate and step <= 2 * self._warmup_steps + _CALM_STEPS:
            causes.append(
                {
                    "cause": "schedule",
                    "detail": f"the learning rate reached its peak in step {self._warmup_steps}; use a longer warmup",
                }
            )
        return causes

    def _follow(self, step: int, loss: float) -> list[dict[str, Any]]:
        spike = self._spike
        assert spike is not None
        spike.peak = max(spike.peak, loss)
        spike.calm = spike.calm + 1 if loss <= spike.baseline + _CALM_WIDTHS * spike.width else 0
        steps = step - spike.step
        recovered = spike.calm >= _CALM_STEPS
        if not recovered and steps < _LATEST_STEPS:
            return []
        self._spike = None
        line: dict[str, Any] = {"spike_step": spike.step, "peak": spike.peak, "height": spike.peak - spike.baseline}
        if recovered:
            first_calm = steps - _CALM_STEPS + 1
            return [{"event": "recovered", **line, "after_steps": first_calm, "soon": first_calm <= _SOON_STEPS}]
        self._losses.clear()  # this level is the new one
        warning = f"the loss has not come back within {_LATEST_STEPS} steps of the spike in step {spike.step}"
        return [{"event": "not-recovered", **line, "warning": warning}]

    def state(self) -> dict[str, Any]:
        """Everything that later lines depend on."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "spike": None if self._spike is None else asdict(self._spike),
            "tokens": self._tokens.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._losses = deque(state["losses"], maxlen=_WINDOW)
        self._norms = deque(state["norms"], maxlen=_WINDOW)
        self._spike = None if state["spike"] is None else Spike(**state["spike"])
        self._tokens.restore(state["tokens"])


def _level(losses: Sequence[float]) -> tuple[float, float]:
    """Baseline and width; 1.4826 makes the deviation a standard deviation of normal values."""
    baseline = median(losses)
    deviation = median(abs(loss - baseline) for loss in losses)
    return baseline, max(1.4826 * deviation, _LEAST_WIDTH * abs(baseline), 1e-9)
