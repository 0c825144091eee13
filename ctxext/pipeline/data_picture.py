"""The lengths of training documents as a picture: how many there are, and how much of the tokens they hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ctxext.evaluation.cells import length_label
from ctxext.evaluation.heatmap import Picture, drawing_style, render

_BEFORE, _AFTER, _LINE = "#9fb3c8", "#243b53", "#c4320a"


def length_picture(
    before: npt.NDArray[np.int64], after: npt.NDArray[np.int64], *, window_tokens: int, target_length: int
) -> Picture:
    """Two histograms over lengths in doublings: documents above, share of the tokens below, read against available.

    Args:
        before: tokens of every document there is.
        after: tokens of every piece that training reads.
    """
    low = int(np.floor(np.log2(max(min(before.min(), after.min()), 1))))
    high = int(np.ceil(np.log2(max(before.max(), after.max(), target_length) + 1)))
    edges = np.power(2.0, np.arange(low, high + 1))
    with drawing_style():
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        documents, tokens = figure.subplots(2, 1, sharex=True)
        _bars(documents, edges, np.histogram(before, edges)[0], np.histogram(after, edges)[0])
        shares = [np.histogram(lengths, edges, weights=lengths)[0] / lengths.sum() for lengths in (before, after)]
        _bars(tokens, edges, *shares)
        documents.set_ylabel("documents, with repeats")
        tokens.set_ylabel("share of tokens")
        tokens.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        tokens.set_xlabel("tokens a document")
        tokens.set_xscale("log", base=2)
        tokens.set_xticks(edges, [length_label(int(edge)) for edge in edges])
        tokens.xaxis.set_minor_locator(NullLocator())
        tokens.set_xlim(edges[0], edges[-1])
        for axes in (documents, tokens):
            axes.spines[["top", "right"]].set_visible(False)
            _mark(
                axes,
                window_tokens,
                "window" if window_tokens != target_length else "window = target",
                axes is documents,
            )
            if window_tokens != target_length:
                _mark(axes, target_length, "target", axes is documents)
        figure.legend(*documents.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
        return render(figure)


def _bars(
    axes: Axes, edges: npt.NDArray[np.float64], before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]
) -> None:
    """Two bars in every doubling, side by side: each takes its part of the doubling on the logarithmic axis."""
    for values, start, stop, colour, label in (
        (before, 0.08, 0.5, _BEFORE, "available"),
        (after, 0.5, 0.92, _AFTER, "read in training"),
    ):
        left = edges[:-1] * 2.0**start
        axes.bar(left, values, width=edges[:-1] * 2.0**stop - left, align="edge", color=colour, label=label)


def _mark(axes: Axes, tokens: int, name: str, labelled: bool) -> None:
    axes.axvline(tokens, color=_LINE, linewidth=1.0, linestyle=(0, (4, 3)))
    if labelled:
        axes.annotate(
            f"{name} {length_label(tokens)} ",
            (tokens, 1.0),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            color=_LINE,
            fontsize=8,
        )
