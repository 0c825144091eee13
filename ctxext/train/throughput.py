"""How well the machine is used: model FLOPs utilisation, tokens so far, memory peak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ctxext.data.packing import PackedWindow
from ctxext.model.peaks import peak_bytes
from ctxext.train.monitors import StepEvent


class ThroughputMonitor:
    """Says with every step what share of the machine's speed the model got (PaLM, Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B).

    Attention counts, what activation checkpoints compute again does not. The padding that best-fit packing leaves at
    the end of windows counts as work, but is no token.

    Args:
        flops_per_step: of the model, over all processes.
        flops_per_second: of all devices together at their best.
        speed_source: where that figure is from, for readers.
    """

    name = "throughput"

    def __init__(self, flops_per_step: float, flops_per_second: float, speed_source: str, device: torch.device) -> None:
        self._flops_per_step = flops_per_step
        self._flops_per_second = flops_per_second
        self._speed_source = speed_source
        self._device = device
        self._num_tokens = 0
        self._told = False

    def before_step(self, step: int, windows: Sequence[PackedWindow]) -> None:
        """Nothing is recorded inside the model."""

    def after_step(self, event: StepEvent) -> list[dict[str, Any]]:
        """The step's figures; the first line of a process also says what they are measured against."""
        self._num_tokens += event.metrics.num_tokens
        line: dict[str, Any] = {
            "utilization": self._flops_per_step / event.metrics.seconds / self._flops_per_second,
            "num_tokens_so_far": self._num_tokens,
        }
        peak = peak_bytes(self._device)
        if peak is not None:
            line["peak_bytes"] = peak
        if not self._told:
            self._told = True
            line |= {
                "flops_per_step": self._flops_per_step,
                "flops_per_second": self._flops_per_second,
                "speed_source": self._speed_source,
            }
        return [line]

    def state(self) -> dict[str, Any]:
        """Tokens so far."""
        return {"num_tokens": self._num_tokens}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._num_tokens = state["num_tokens"]
