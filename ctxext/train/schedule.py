"""The learning rate as a pure function of the step, so that a checkpoint need not hold it."""

from __future__ import annotations

import math


def learning_rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warmup over `warmup * steps` steps (at least one), then cosine to zero; `step` counts from 0."""
    num_warmup = max(round(steps * warmup), 1)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(steps - num_warmup, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
