"""Attention entropy by layer and head, and how much of the attention goes far, on sampled queries of training windows.

Recorded inside a training step (`model/attention_record.py`), so it costs a few rows of weights and no forward pass of
its own. A head that collapses looks at one token whatever comes, 0 bits, which goes before diverging losses (Zhai et
al. 2023, arXiv:2303.06296); one that looks at all n keys alike, log2(n) bits, carries nothing. Healthy language models
lie at 2 to 4 bits in the mean; single heads lie anywhere. What counts is how the numbers move from the first look on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ctxext.data.packing import PackedWindow
from ctxext.model.attention_record import AttentionRecord, recording
from ctxext.train.monitors import StepEvent

NUM_QUERIES = 16
_COLLAPSED_BITS = 0.1
_UNIFORM_SHARE = 0.98
# From the first look on: heads, as a share of all, and bits in the mean.
_MORE_HEADS = 0.1
_MOVED_BITS = 1.0


class AttentionMonitor:
    """Looks at the first window of the first step, of every `every`-th, and of the last.

    The first look is at the weights before their first update.

    Args:
        original_length: what lies farther away, the base model could not see.
        target_length: its half is the other distance.
    """

    name = "attention"

    def __init__(self, every: int, steps: int, original_length: int, target_length: int) -> None:
        self._every = every
        self._steps = steps
        self._distances = (original_length, target_length // 2)
        self._first: dict[str, float] | None = None
        self._record: AttentionRecord | None = None
        self._block = ExitStack()

    def before_step(self, step: int, windows: Sequence[PackedWindow]) -> None:
        """Begin to record where this step is looked at."""
        self._stop()
        if windows and (step == 1 or step == self._steps or step % self._every == 0):
            positions = torch.tensor(windows[0].position_ids)
            self._record = AttentionRecord(positions, sampled_rows(len(positions)), self._distances)
            self._block.enter_context(recording(self._record))

    def after_step(self, event: StepEvent) -> list[dict[str, Any]]:
        """What was recorded in this step."""
        record = self._stop()
        if record is None or event.metrics.skipped:  # what it saw in a skipped step may not be finite
            return []
        line = _line(record)
        if record.layers:
            found = {key: line[key] for key in ("num_collapsed", "num_uniform", "mean_entropy_bits")}
            if self._first is None:
                self._first = found
            num_heads = sum(len(heads) for heads in line["entropy_bits"])
            if warning := _warning(self._first, found, num_heads):
                line["warning"] = warning
        return [line]

    def _stop(self) -> AttentionRecord | None:
        self._block.close()
        record, self._record = self._record, None
        return record

    def state(self) -> dict[str, Any]:
        """The first look's figures."""
        return {"first": self._first}

    def restore(self, state: dict[str, Any]) -> None:
        """Compare with the stored first look."""
        self._first = state["first"]


def sampled_rows(num_tokens: int) -> list[int]:
    """Queries of the second half of a window, evenly spaced, the last one included."""
    count = min(NUM_QUERIES, num_tokens)
    return sorted({num_tokens - 1 - (number * (num_tokens // 2)) // count for number in range(count)})


def _line(record: AttentionRecord) -> dict[str, Any]:
    layers = sorted(record.layers)
    entropies = {layer: record.layers[layer].entropy for layer in layers}
    collapsed = _heads({layer: bits < _COLLAPSED_BITS for layer, bits in entropies.items()})
    uniform = _heads({n: bits > _UNIFORM_SHARE * record.layers[n].uniform_bits for n, bits in entropies.items()})
    line: dict[str, Any] = {
        "num_tokens": len(record.positions),
        "num_queries": len(record.rows),
        "layers": layers,
        "entropy_bits": [_rounded(bits) for bits in entropies.values()],
        "uniform_bits": [round(record.layers[layer].uniform_bits, 3) for layer in layers],
        "collapsed": collapsed,
        "num_collapsed": len(collapsed),
        "uniform": uniform,
        "num_uniform": len(uniform),
    }
    if layers:
        line["mean_entropy_bits"] = round(float(torch.cat(list(entropies.values())).mean()), 4)
    for number, name in enumerate(("beyond_original", "beyond_half")):
        by_layer = [_number(record.layers[layer].far[:, number].mean()) for layer in layers]
        line[f"{name}_tokens"] = record.distances[number]
        line[f"{name}_by_layer"] = by_layer
        known = [share for share in by_layer if share is not None]
        if known:
            line[f"{name}_share"] = round(sum(known) / len(known), 5)
    if record.unknown:
        line["not_recorded"] = {str(layer): reason for layer, reason in record.unknown.items()}
    return line


def _heads(found: dict[int, Tensor]) -> list[list[int]]:
    """[layer, head] of every head that is marked."""
    return [[layer, int(head)] for layer, marks in found.items() for head in marks.nonzero().flatten()]


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 3) for value in values]


def _number(value: Tensor) -> float | None:
    """None where no query of the layer can see so far."""
    return None if bool(torch.isnan(value)) else round(float(value), 5)


def _warning(first: dict[str, float], now: dict[str, float], num_heads: int) -> str | None:
    for key, what in (("num_collapsed", "look at a single token"), ("num_uniform", "look at everything alike")):
        if now[key] - first[key] > _MORE_HEADS * num_heads:
            return f"{now[key]} of {num_heads} attention heads {what}, {first[key]} did at the first look"
    if abs(now["mean_entropy_bits"] - first["mean_entropy_bits"]) > _MOVED_BITS:
        before, after = first["mean_entropy_bits"], now["mean_entropy_bits"]
        return f"the mean attention entropy went from {before:.2f} to {after:.2f} bits (2 to 4 are healthy)"
    return None
