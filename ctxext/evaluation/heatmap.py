"""Retrieval by position as a picture: rows are depths (0 at the top) or absolute token positions, columns are lengths,
one panel an arm.

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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from ctxext.evaluation.conclusions import Arm
from ctxext.evaluation.store import SampleResult, grid_of

RowsBy = Literal["depth", "position"]

COLOR_MAP = "cividis"
RECORDED_MARK = "recorded on another machine"
_INK = "#1f2328"
_MUTED = "#59636e"
_BOUNDARY = "#c4320a"
_MAX_POSITION_ROWS = 16
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


@dataclass(frozen=True)
class CellCount:
    """What a cell shows: right answers of scored samples, and samples without a score."""

    num_right: int
    num_scored: int
    num_missing: int

    def text(self) -> str:
        """'3/4', or why there is nothing to show."""
        if self.num_scored == 0:
            return f"{self.num_missing} missing" if self.num_missing else ""
        text = f"{self.num_right}/{self.num_scored}"
        return f"{text}\n+{self.num_missing} missing" if self.num_missing else text


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
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(png.getvalue(), svg.getvalue())


def length_label(tokens: int) -> str:
    """A length for people: 2048 is '2K', 14848 is '14.5K', 1048576 is '1M', 1000 stays '1,000'."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens * 2 % unit == 0:
            return f"{tokens / unit:g}{name}"
    return f"{tokens:,}"


def boundary_slot(length: int, columns: Sequence[int]) -> float:
    """Where a length lies between categorical columns: right of every column that is not longer."""
    return sum(column <= length for column in columns) - 0.5


def cell_counts(arm: Arm) -> dict[tuple[int, float], CellCount]:
    """Counts by length and depth, pooled over tasks."""
    counts: dict[tuple[int, float], CellCount] = {}
    for result in grid_of(arm.samples):
        place = (result.cell.length_tokens, result.cell.depth)
        before = counts.get(place, CellCount(0, 0, 0))
        right = result.proportion.num_successes if result.proportion else 0
        counts[place] = CellCount(
            before.num_right + right, before.num_scored + result.num_samples, before.num_missing + result.num_missing
        )
    return counts


def position_counts(arm: Arm, row_tokens: int) -> dict[tuple[int, float], CellCount]:
    """Counts by length and row of `row_tokens` absolute positions (named by its first), pooled over tasks."""
    groups: defaultdict[tuple[int, float], list[SampleResult]] = defaultdict(list)
    for sample in arm.samples:
        groups[sample.length_tokens, float(sample.needle_position // row_tokens * row_tokens)].append(sample)
    return {
        place: CellCount(
            sum(s.status == "ok" and s.score >= 1.0 for s in members),
            sum(s.status == "ok" for s in members),
            sum(s.status != "ok" for s in members),
        )
        for place, members in groups.items()
    }


def position_rows(longest: int) -> list[float]:
    """First positions of 8 to 16 rows of equal height, a power of two of tokens each, up to the longest length."""
    row_tokens = 2 ** max(0, math.ceil(math.log2(max(longest, 1) / _MAX_POSITION_ROWS)))
    return [float(start) for start in range(0, max(longest, 1), row_tokens)]


def heatmap(
    arms: Sequence[Arm],
    *,
    original_length: int,
    target_length: int,
    alike: Sequence[Arm] | None = None,
    rows_by: RowsBy = "depth",
) -> Picture:
    """Draw one arm, or several side by side with one colour bar.

    Args:
        alike: arms whose rows and columns count too, so that pictures of single arms have equal grids.
        rows_by: `depth`, or `position`: the needle's absolute token index, in rows of equal height. Needles of several
            depths that fall into one row are counted together, and a row beyond a length stays empty.

    Raises:
        ValueError: no arms.
    """
    if not arms:
        raise ValueError("no arms to draw")
    grids = {
        arm.recorded: _grid([a for a in [*arms, *(alike or ())] if a.recorded == arm.recorded], rows_by) for arm in arms
    }
    width = max(_panel_width(len(lengths)) for lengths, _ in grids.values())
    height = max(1.9 + (0.5 if rows_by == "depth" else 0.36) * len(places) for _, places in grids.values())
    rows = _rows(arms, max(1, int(_MAX_WIDTH_INCHES // width)))
    num_columns = max(len(row) for row in rows)
    with drawing_style():
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        figure = Figure(figsize=(width * num_columns + 0.7, height * len(rows)), layout=layout)
        axes = figure.subplots(len(rows), num_columns, squeeze=False)
        for row, row_axes in zip(rows, axes, strict=True):
            for axis, arm in itertools.zip_longest(row_axes, row):
                if arm is None:
                    axis.set_axis_off()
                    continue
                lengths, places = grids[arm.recorded]
                _draw_panel(axis, arm, lengths, places, width, rows_by)
                draw_boundaries(axis, lengths, original_length, target_length)
        scale = ScalarMappable(Normalize(0.0, 1.0), COLOR_MAP)
        bar = figure.colorbar(scale, ax=axes, label="share of right answers", aspect=20 * len(rows), pad=0.02)
        bar.outline.set_visible(False)
        return render(figure)


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


def _grid(arms: Sequence[Arm], rows_by: RowsBy) -> tuple[list[int], list[float]]:
    samples = [sample for arm in arms for sample in arm.samples]
    lengths = sorted({s.length_tokens for s in samples})
    if rows_by == "position":
        return lengths, position_rows(max(lengths, default=0))
    return lengths, sorted({s.depth for s in samples})


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


def _panel_width(num_lengths: int) -> float:
    return max(3.5, 0.9 + max(0.5, min(0.75, 7.0 / max(num_lengths, 1))) * num_lengths)


def _draw_panel(axis: Axes, arm: Arm, lengths: list[int], places: list[float], width: float, rows_by: RowsBy) -> None:
    by_depth = rows_by == "depth"
    row_tokens = int(places[1]) if len(places) > 1 else max(lengths, default=1)
    counts = cell_counts(arm) if by_depth else position_counts(arm, row_tokens)
    hatched = False
    for column, length in enumerate(lengths):
        for row, place in enumerate(places):
            if not by_depth and place >= length:
                continue
            count = counts.get((length, place), CellCount(0, 0, 0))
            _draw_cell(axis, column, row, count)
            hatched = hatched or count.num_scored == 0
    axis.set_xlim(-0.5, max(len(lengths), 1) - 0.5)
    axis.set_ylim(max(len(places), 1) - 0.5, -0.5)
    axis.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
    axis.set_yticks(
        range(len(places)), [f"{place:g}" if by_depth else f"from {length_label(int(place))}" for place in places]
    )
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("context length (tokens)" + ("\nhatched: no scored sample" if hatched else ""))
    axis.set_ylabel("depth of the needle (0 = start)" if by_depth else "position of the needle (token index)")
    _draw_title(axis, arm, width)


def _draw_cell(axis: Axes, column: int, row: int, count: CellCount) -> None:
    place = (column - 0.5, row - 0.5)
    if count.num_scored == 0:
        axis.add_patch(Rectangle(place, 1, 1, facecolor="#f6f8fa", edgecolor="#8c959f", hatch="////", linewidth=0))
        ink, background = _MUTED, {"facecolor": "#f6f8fa", "edgecolor": "none", "pad": 1.5}
    else:
        color = colormaps[COLOR_MAP](count.num_right / count.num_scored)
        axis.add_patch(Rectangle(place, 1, 1, facecolor=color, edgecolor="none"))
        ink, background = ink_on(color), None
    axis.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="white", linewidth=1.5))
    if text := count.text():
        size = 9.5 if "missing" not in text else 7.0
        axis.text(column, row, text, ha="center", va="center", color=ink, fontsize=size, bbox=background)


def _draw_title(axis: Axes, arm: Arm, width: float) -> None:
    lines = textwrap.wrap(arm.label, int(width * 9)) or [arm.name]
    samples, haystacks = len(arm.scored), arm.num_haystacks
    name = f"{arm.name} · " if arm.name != arm.label else ""
    facts = f"{name}{samples} sample{'s' * (samples != 1)}, {haystacks} haystack{'s' * (haystacks != 1)}"
    if arm.recorded:
        facts = f"{RECORDED_MARK}\n{facts}"
    # The space below the facts belongs to the two labels of the boundary lines.
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "left", "va": "bottom"}
    axis.annotate(facts, xy=(0, 1), xytext=(0, 29), fontsize=8, color=_MUTED, **above)  # type: ignore[arg-type]
    rise = 29 + 11.5 * (1 + facts.count("\n"))
    axis.annotate("\n".join(lines), xy=(0, 1), xytext=(0, rise), fontsize=11, fontweight="bold", **above)  # type: ignore[arg-type]
