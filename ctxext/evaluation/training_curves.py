"""How a training went, as pictures: loss, gradient norm and rate over the steps; attention by layer and head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ctxext.evaluation.cells import length_label
from ctxext.evaluation.heatmap import COLOR_MAP, Picture, drawing_style, render

Line = Mapping[str, Any]

_BLUE, _GREY, _RED, _ORANGE = "#0072b2", "#5f6670", "#c4320a", "#b87a00"
_MUTED = "#59636e"
_SMOOTHED_OVER = 20
_DIVISIONS = 8


def training_curves(steps: Sequence[Line], spikes: Sequence[Line], evaluations: Sequence[Line]) -> Picture:
    """Loss, gradient norm and learning rate over the steps, spikes and evaluations marked.

    Raises:
        ValueError: no steps.
    """
    if not steps:
        raise ValueError("no steps to draw")
    with drawing_style():
        figure = Figure(figsize=(7.2, 5.4), layout=ConstrainedLayoutEngine(h_pad=0.08))
        loss, norm, rate = figure.subplots(3, 1, sharex=True, height_ratios=(2.2, 1.2, 1))
        _over_steps(loss, steps, "loss", "loss (nats per token)")
        _over_steps(norm, steps, "grad_norm", "gradient norm")
        _over_steps(rate, steps, "learning_rate", "learning rate", smooth=False)
        norm.set_yscale("log")
        for which in (norm.yaxis.set_major_formatter, norm.yaxis.set_minor_formatter):
            which(FuncFormatter(_plain_tick))
        for number, line in enumerate(spikes):
            loss.axvline(line["step"], color=_RED, linewidth=1.2, label="spike" if number == 0 else None)
        for number, line in enumerate(evaluations):
            label = "evaluated" if number == 0 else None
            loss.axvline(line["step"], color=_ORANGE, linewidth=0.9, linestyle=(0, (4, 2)), label=label)
        if loss.get_legend_handles_labels()[0]:
            loss.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1.0, 0.99))
        rate.set_xlabel("step")
        rate.xaxis.set_major_locator(MaxNLocator(integer=True))
        return render(figure)


def _plain_tick(value: float, place: int | None) -> str:
    """1, 2 and 5 times a power of ten; labels of the others would meet."""
    digit = value / 10 ** math.floor(math.log10(value)) if value > 0 else 0.0
    return f"{value:g}" if round(digit) in (1, 2, 5) and math.isclose(digit, round(digit)) else ""


def _over_steps(axis: Axes, steps: Sequence[Line], key: str, label: str, smooth: bool = True) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6eaef", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_ylabel(label)
    known = [(line["step"], line[key]) for line in steps if isinstance(line.get(key), int | float)]
    xs, ys = [x for x, _ in known], [y for _, y in known]
    width = min(_SMOOTHED_OVER, len(ys) // _DIVISIONS)
    if smooth and width > 1:
        axis.plot(xs, ys, color=_GREY, linewidth=0.8, alpha=0.55, label="every step")
        mean = np.convolve(ys, np.ones(width) / width, mode="valid")
        axis.plot(xs[width - 1 :], mean, color=_BLUE, linewidth=1.7, label=f"mean of {width} steps")
    else:
        axis.plot(xs, ys, color=_BLUE, linewidth=1.7, marker="o" if len(xs) < 30 else None, markersize=3)


def attention_heatmap(first: Line, last: Line) -> Picture:
    """Entropy in bits by layer and head, at the first look and at the last, in one scale.

    Raises:
        ValueError: a look without a layer.
    """
    looks = [first] if first["step"] == last["step"] else [first, last]
    grids = [_grid(look) for look in looks]
    top = max(float(np.nanmax(grid)) for grid in grids)
    with drawing_style():
        rows, columns = grids[0].shape
        size = (max(3.0, min(0.16 * columns + 1.4, 7.0)) * len(looks) + 0.8, max(2.6, min(0.14 * rows + 1.4, 9.0)))
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine())
        axes = list(figure.subplots(1, len(looks), sharey=True, squeeze=False).flat)
        for axis, look, grid in zip(axes, looks, grids, strict=True):
            image = axis.imshow(grid, aspect="auto", cmap=COLOR_MAP, vmin=0.0, vmax=top, interpolation="nearest")
            axis.set_title(f"step {look['step']}", fontsize=9, loc="left")
            axis.set_xlabel("head")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            ticks = range(0, rows, max(1, math.ceil(rows / 16)))
            axis.set_yticks(list(ticks), [str(look["layers"][row]) for row in ticks])
        axes[0].set_ylabel("layer")
        figure.colorbar(image, ax=axes, label="attention entropy (bits)", shrink=0.9)
        return render(figure)


def _grid(look: Line) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[layers, heads]; layers with fewer heads end in NaN."""
    rows = look["entropy_bits"]
    if not rows:
        raise ValueError("no layer was recorded")
    width = max(len(row) for row in rows)
    return np.array([[*row, *[math.nan] * (width - len(row))] for row in rows], dtype=float)


def long_range_share(first: Line, last: Line) -> Picture | None:
    """Share of attention beyond the original length by layer, first look and last; None where none can look so far."""
    looks = [first] if first["step"] == last["step"] else [first, last]
    if not any(share is not None for look in looks for share in look["beyond_original_by_layer"]):
        return None
    with drawing_style():
        figure = Figure(figsize=(4.9, 3.2), layout=ConstrainedLayoutEngine())
        axis = figure.subplots()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6eaef", linewidth=0.8)
        for look, color, dash, marker in zip(looks, (_GREY, _BLUE), ((0, (1, 1.6)), "solid"), "oD", strict=False):
            known = [
                (layer, share)
                for layer, share in zip(look["layers"], look["beyond_original_by_layer"], strict=True)
                if share is not None
            ]
            xs, ys = [layer for layer, _ in known], [share for _, share in known]
            style: Any = {"color": color, "linestyle": dash, "marker": marker, "markersize": 4, "linewidth": 1.5}
            axis.plot(xs, ys, label=f"step {look['step']}", **style)
        axis.set_ylim(bottom=0.0)
        axis.set_xlabel("layer")
        axis.set_ylabel(f"attention beyond {length_label(first['beyond_original_tokens'])} tokens")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, fontsize=8)
        axis.tick_params(colors=_MUTED)
        return render(figure)
