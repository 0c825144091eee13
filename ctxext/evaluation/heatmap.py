"""Retrieval as a picture: columns are lengths; rows are depths (0 at the top), absolute token positions or tasks; one
panel an arm.

Columns are categories, not a scale: 2K, 4K and 12K stand side by side, and the original and the target length are
drawn between the columns where they belong; a column of exactly the original length is still inside. Arms of one
origin (live or recorded) share rows and columns, so that a cell is at the same place in each. The same samples give
the same bytes, as PNG and as SVG.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from ctxext.evaluation.arms import Arm
from ctxext.evaluation.cells import NOT_ASKED, CellCount, Frame, Over, frame_of, length_label

COLOR_MAP = "cividis"
RECORDED_MARK = "recorded on another machine"
_INK = "#1f2328"
_MUTED = "#59636e"
_BOUNDARY = "#c4320a"
_MAX_WIDTH_INCHES = 16.5
_STYLE: Any = {
    "svg.hashsalt": "ctxext",
    "text.parse_math": False,  # a label with two dollar signs is no formula
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": "#d1d9e0",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "hatch.linewidth": 0.6,
    "hatch.color": "#8c959f",
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure in both formats."""

    png: bytes
    svg: bytes


@contextmanager
def drawing_style() -> Iterator[None]:
    """The project's look, independent of the user's matplotlib settings and undone afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def render(figure: Figure) -> Picture:
    """Both formats of a figure, without dates or program versions; call it inside `drawing_style`."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is made once for both
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(png.getvalue(), svg.getvalue())


def boundary_slot(length: int, columns: Sequence[int]) -> float:
    """Where a length lies between categorical columns: right of every column that is not longer."""
    return sum(column <= length for column in columns) - 0.5


def heatmap(
    arms: Sequence[Arm],
    *,
    original_length: int,
    target_length: int,
    alike: Sequence[Arm] | None = None,
    over: Over = "depth",
    footnote: str | None = None,
) -> Picture:
    """Draw one arm, or several side by side with one colour bar.

    Args:
        alike: arms whose rows and columns count too, so that pictures of single arms have equal grids.
        over: `depth`, `task`, or `position`: the needle's absolute token index, in rows of equal height. Needles of
            several depths that fall into one row are counted together, and a row beyond a length stays empty.
        footnote: what must stand below the picture, such as how far the suite reached.

    Raises:
        ValueError: no arms.
    """
    if not arms:
        raise ValueError("no arms to draw")
    frames = {
        arm.recorded: frame_of([a for a in [*arms, *(alike or ())] if a.recorded == arm.recorded], over) for arm in arms
    }
    width = max(_panel_width(frame) for frame in frames.values())
    height = max(2.1 + (0.36 if over == "position" else 0.5) * len(frame.places) for frame in frames.values())
    rows = _rows(arms, max(1, int(_MAX_WIDTH_INCHES // width)))
    num_columns = max(len(row) for row in rows)
    with drawing_style():
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        figure = Figure(figsize=(width * num_columns + 0.7, height * len(rows) + 0.2 * bool(footnote)), layout=layout)
        axes = figure.subplots(len(rows), num_columns, squeeze=False)
        for row, row_axes in zip(rows, axes, strict=True):
            for axis, arm in itertools.zip_longest(row_axes, row):
                if arm is None:
                    axis.set_axis_off()
                    continue
                frame = frames[arm.recorded]
                _draw_panel(axis, arm, frame, width)
                draw_boundaries(axis, frame.lengths, original_length, target_length)
        scale = ScalarMappable(Normalize(0.0, 1.0), COLOR_MAP)
        bar = figure.colorbar(scale, ax=axes, label="share of right answers", aspect=20 * len(rows), pad=0.02)
        bar.outline.set_visible(False)
        draw_footnote(figure, footnote)
        return render(figure)


def draw_footnote(figure: Figure, footnote: str | None) -> None:
    """What limits the picture, below it, in the colour of the boundaries."""
    if footnote:
        width = int(figure.get_figwidth() * 15)
        figure.supxlabel(textwrap.fill(footnote, width), x=0.02, ha="left", fontsize=8, color=_BOUNDARY)


def draw_boundaries(axis: Axes, columns: Sequence[int], original_length: int, target_length: int) -> None:
    """Lines at the original (dashed) and target length (solid), labelled at two heights so that labels never meet."""
    slots = [boundary_slot(length, columns) for length in (original_length, target_length)]
    shift = 0.05 if slots[0] == slots[1] else 0.0
    draw_boundary(axis, slots[0] - shift, f"original {length_label(original_length)}", dashed=True)
    draw_boundary(axis, slots[1] + shift, f"target {length_label(target_length)}", dashed=False)


def draw_boundary(axis: Axes, x: float, label: str, *, dashed: bool) -> None:
    """One vertical line at data coordinate `x` with its label above the axes; set the x limits before."""
    left, right = axis.get_xlim()
    place = (x - left) / (right - left)
    side = "left" if place < 0.15 else "right" if place > 0.85 else "center"
    rise = 1.0 if dashed else 13.0
    style = (0, (4, 2.5)) if dashed else "solid"
    # Not clipped: at the edge of the axes half of the line would be lost.
    axis.axvline(x, color=_BOUNDARY, linewidth=1.6, linestyle=style, clip_on=False)
    axis.annotate(
        label,
        xy=(x, 1),
        xycoords=axis.get_xaxis_transform(),
        xytext=(0, rise + 1),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=8,
        color=_BOUNDARY,
        annotation_clip=False,
    )


def _rows(arms: Sequence[Arm], capacity: int) -> list[list[Arm]]:
    """Live arms first, recorded ones on rows of their own, rows of nearly equal length."""
    rows: list[list[Arm]] = []
    for recorded in (False, True):
        members = [arm for arm in arms if arm.recorded == recorded]
        if members:
            step = math.ceil(len(members) / math.ceil(len(members) / capacity))
            rows += [members[start : start + step] for start in range(0, len(members), step)]
    return rows


def ink_on(color: Sequence[float]) -> str:
    """Black or white, whichever stands out more on an sRGB colour (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 else "white"


def _panel_width(frame: Frame) -> float:
    num_lengths = max(len(frame.lengths), 1)
    names = max((len(frame.label(place)) for place in frame.places), default=0)
    return max(3.5, 0.9 + 0.06 * max(names - 4, 0) + max(0.5, min(0.75, 7.0 / num_lengths)) * len(frame.lengths))


_ROW_NAMES: dict[Over, str] = {
    "depth": "depth of the needle (0 = start)",
    "position": "position of the needle (token index)",
    "task": "",
}


def _draw_panel(axis: Axes, arm: Arm, frame: Frame, width: float) -> None:
    counts = frame.cells(arm)
    notes = dict[str, None]()
    for column, length in enumerate(frame.lengths):
        for row, place in enumerate(frame.places):
            if frame.is_outside(length, place):
                continue
            count = counts.get((length, place), NOT_ASKED)
            _draw_cell(axis, column, row, count)
            if count.num_scored == 0:
                unasked = "hatched: no needle there" if frame.over == "position" else "hatched: not asked"
                notes["hatched: no scored sample" if count.num_missing else unasked] = None
            elif count.num_degenerate:
                notes["†: answers empty, repeating or endless"] = None
    axis.set_xlim(-0.5, max(len(frame.lengths), 1) - 0.5)
    axis.set_ylim(max(len(frame.places), 1) - 0.5, -0.5)
    axis.set_xticks(range(len(frame.lengths)), [length_label(length) for length in frame.lengths])
    axis.set_yticks(range(len(frame.places)), [frame.label(place) for place in frame.places])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("\n".join(["context length (tokens)", *notes]))
    axis.set_ylabel(_ROW_NAMES[frame.over])
    _draw_title(axis, arm, width)


def _draw_cell(axis: Axes, column: int, row: int, count: CellCount) -> None:
    place = (column - 0.5, row - 0.5)
    if count.num_scored == 0:
        axis.add_patch(Rectangle(place, 1, 1, facecolor="#f6f8fa", edgecolor="#8c959f", hatch="////", linewidth=0))
        axis.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="white", linewidth=1.5))
        ink, background = _MUTED, {"facecolor": "#f6f8fa", "edgecolor": "none", "pad": 1.5}
    else:
        color = colormaps[COLOR_MAP](count.value)
        axis.add_patch(Rectangle(place, 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
        ink, background = ink_on(color), None
    if text := count.text():
        size = (9.5, 8.0, 6.5)[min(text.count("\n"), 2)] if count.num_scored else 6.5
        axis.text(
            column,
            row,
            textwrap.fill(text, 9) if not count.num_scored else text,
            ha="center",
            va="center",
            color=ink,
            fontsize=size,
            linespacing=0.95,
            bbox=background,
        )


def _draw_title(axis: Axes, arm: Arm, width: float) -> None:
    lines = textwrap.wrap(arm.label, int(width * 9)) or [arm.name]
    samples, haystacks = len(arm.scored), arm.num_haystacks
    name = f"{arm.name} · " if arm.name != arm.label else ""
    facts = f"{name}{samples} sample{'s' * (samples != 1)}, {haystacks} haystack{'s' * (haystacks != 1)}"
    saliency = [task for task in arm.tasks if arm.is_saliency(task)]
    if saliency:
        some = f" in {len(saliency)} of {len(arm.tasks)} tasks"
        if len(saliency) == len(arm.tasks):
            some, facts = "", f"{name}{samples} sample{'s' * (samples != 1)} in one text"
        facts = f"repeated noise: saliency, not retrieval{some}\n{facts}"
    if arm.recorded:
        facts = f"{RECORDED_MARK}\n{facts}"
    # The space below the facts belongs to the two labels of the boundary lines.
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "left", "va": "bottom"}
    axis.annotate(facts, xy=(0, 1), xytext=(0, 29), fontsize=8, color=_MUTED, **above)  # type: ignore[arg-type]
    rise = 29 + 11.5 * (1 + facts.count("\n"))
    axis.annotate("\n".join(lines), xy=(0, 1), xytext=(0, rise), fontsize=11, fontweight="bold", **above)  # type: ignore[arg-type]
