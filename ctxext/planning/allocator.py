"""What PyTorch's allocator really handed out while something ran: the measured figure beside a traced one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_growth_bytes(work: Callable[[], object], device: torch.device) -> int:
    """How far the bytes in use rose above those at the start while `work` ran.

    On CUDA from the allocator's counters; on the CPU, where it has none, from the profiler's record of every block,
    which slows `work` down. Both see what kernels allocate for themselves.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes two lines about itself to the terminal
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    return _highest(recorded)


def _highest(recorded: Any) -> int:
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
