"""The learning rate as a pure function of the step, so that a checkpoint need not hold it."""

from __future__ import annotations

import math
from typing import Literal

from ctxext.recipe.train import num_warmup_steps

Decay = Literal["cosine", "inverse-sqrt"]


def learning_rate_at(step: int, steps: int, peak: float, warmup: float, decay: Decay = "cosine") -> float:
    """Linear warmup to `peak`, then a decay; `step` counts from 0.

    `cosine` falls to zero at the last step. `inverse-sqrt` is the schedule of Vaswani et al. 2017 (arXiv:1706.03762,
    section 5.3), scaled to its peak: peak * min(n / w, sqrt(w / n)) in step n = 1, 2, ... with w warmup steps. It is
    continuous at n = w, where both are `peak`; it does not know where training ends, so a run can be made longer, and
    w alone says how fast it falls: to half of the peak after 4 w steps.
    """
    num_warmup = num_warmup_steps(steps, warmup)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if decay == "inverse-sqrt":
        return peak * math.sqrt(num_warmup / (step + 1))
    progress = (step - num_warmup) / max(steps - num_warmup, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
