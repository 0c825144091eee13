"""Loss and perplexity by position, accuracy by length and by depth as pictures, one line an arm.

Arms of one panel are compared only over prompts that all of them answered: another text has another loss. Each point
averages all of these prompts that are long enough to reach it, so the far end rests on the long prompts alone. Live
and recorded arms get a panel each when both have something to compare. Lines differ in dash and marker, not only in
colour.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MultipleLocator

from ctxext.evaluation.arms import Arm, block_spans
from ctxext.evaluation.cells import length_label
from ctxext.evaluation.heatmap import (
    RECORDED_MARK,
    Picture,
    draw_boundaries,
    draw_boundary,
    draw_footnote,
    drawing_style,
    render,
)
from ctxext.evaluation.statistics import MeanScore
from ctxext.evaluation.store import SampleResult, score_of

# Colours of Okabe and Ito, told apart with every common kind of colour blindness; dash and marker repeat the message.
_LINES: dict[str, tuple[Any, ...]] = {
    "base": ("#5f6670", (0, (1, 1.6)), "o"),
    "untrained": ("#b87a00", (0, (5, 1.5, 1, 1.5)), "^"),
    "control": ("#9b3d78", (0, (5, 2)), "s"),
    "extended": ("#0072b2", "solid", "D"),
}
_OTHER_LINES = (
    ("#0072b2", "solid", "D"),
    ("#9b3d78", (0, (5, 2)), "s"),
    ("#b87a00", (0, (5, 1.5, 1, 1.5)), "^"),
    ("#5f6670", (0, (1, 1.6)), "o"),
    ("#00735c", (0, (8, 2)), "v"),
    ("#a63c06", (0, (3, 1, 1, 1, 1, 1)), "P"),
)
_MUTED = "#59636e"
_NUM_MARKERS = 8
_FAR_FACTOR = 1.5
_LARGEST_LOSS = 700.0  # beyond it a float has no exponential


def common_prompts(arms: Sequence[Arm]) -> set[str]:
    """Hashes of the prompts that every arm has with a score and with losses."""
    each = [{s.prompt_sha256 for s in arm.scored if s.loss_blocks} for arm in arms]
    return set.intersection(*each) if each else set()


def loss_curve(samples: Iterable[SampleResult]) -> list[tuple[float, float]]:
    """Middle position and mean loss of every block, weighted by predicted tokens, over the samples that reach it."""
    sums: defaultdict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for sample in samples:
        width = sample.loss_block_tokens
        for (start, end), loss in zip(block_spans(sample), sample.loss_blocks, strict=False):
            total = sums[start // width, width]
            total[0] += loss * (end - start)
            total[1] += end - start
    return sorted(((block + 0.5) * width, total / tokens) for (block, width), (total, tokens) in sums.items())


def comparable_panels(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Which arms share a panel: live and recorded ones apart when both can be compared among themselves.

    Otherwise all share one, unless they have no prompt in common.
    """
    origins = [[arm for arm in arms if arm.recorded == recorded] for recorded in (False, True)]
    groups = [group for group in origins if group]
    if len(groups) == 2 and min(len(group) for group in groups) == 1 and common_prompts(arms):
        return [list(arms)]
    return groups


def has_losses(arms: Sequence[Arm]) -> bool:
    """Whether any sample has losses to draw."""
    return any(sample.loss_blocks for arm in arms for sample in arm.scored)


def loss_by_position(
    arms: Sequence[Arm], *, original_length: int, target_length: int, footnote: str | None = None
) -> Picture:
    """Draw the mean next-token loss over the position in the context.

    Raises:
        ValueError: no arms.
    """

    def draw(axis: Axes, panel: Sequence[Arm]) -> str:
        shared = common_prompts(panel)
        longest = 1.0
        for arm in panel:
            points = loss_curve(sample for sample in arm.scored if sample.prompt_sha256 in shared)
            longest = max([longest, *(s.length_tokens for s in arm.scored if s.prompt_sha256 in shared)])
            _line(axis, arm, panel, [x for x, _ in points], [y for _, y in points])
        _place_lengths(axis, longest, original_length, target_length)
        axis.set_xlabel("position in the context (tokens)")
        axis.set_ylabel("loss (nats per token)")
        plural = "s" * (len(shared) != 1)
        return f"{len(shared)} common prompt{plural}" if shared else "no prompt with losses in common"

    return _figure("Loss by position", arms, draw, footnote)


def perplexity_by_position(
    arms: Sequence[Arm],
    results: Mapping[str, Mapping[str, Any]],
    *,
    original_length: int,
    target_length: int,
    footnote: str | None = None,
) -> Picture:
    """Draw the perplexity of plain text over the position, and the border of the sliding window where there is one.

    Args:
        results: stored perplexity (`perplexity.json`) by name of the live arm.

    Raises:
        ValueError: no arm has one.
    """
    measured = [arm for arm in arms if not arm.recorded and results.get(arm.name, {}).get("blocks")]

    def draw(axis: Axes, panel: Sequence[Arm]) -> str:
        longest, windows = 1.0, set[int]()
        for arm in panel:
            result = results[arm.name]
            blocks = sorted(result["blocks"], key=lambda block: int(block["start"]))
            places = [(block["start"] + block["end"]) / 2 for block in blocks]
            _line(axis, arm, panel, places, [math.exp(min(block["loss"], _LARGEST_LOSS)) for block in blocks])
            longest = max([longest, *(block["end"] for block in blocks)])
            if result.get("window_tokens"):
                windows.add(int(result["window_tokens"]))
        for window in sorted(windows):
            axis.axvline(window, color=_MUTED, linewidth=1.2, linestyle=(0, (1, 1.5)))
            style: Any = {"fontsize": 8, "color": _MUTED, "rotation": 90, "va": "top", "ha": "right"}
            axis.text(window, 0.98, f"window {length_label(window)} ", transform=axis.get_xaxis_transform(), **style)
        _place_lengths(axis, longest, original_length, target_length)
        axis.set_xlabel("position in the text (tokens)")
        axis.set_ylabel("perplexity")
        kinds = {str(results[arm.name].get("kind", "")).replace("-", " ") for arm in panel}
        return ", ".join(sorted(kinds))

    return _figure("Perplexity by position", measured, draw, footnote)


def accuracy_by_length(
    arms: Sequence[Arm], *, original_length: int, target_length: int, footnote: str | None = None
) -> Picture:
    """Draw the mean score by length, pooled over depths, with Wilson 95% intervals.

    Raises:
        ValueError: no arms.
    """

    def draw(axis: Axes, panel: Sequence[Arm]) -> str:
        lengths = sorted({sample.length_tokens for arm in panel for sample in arm.samples})
        for number, arm in enumerate(panel):
            shift = _side_by_side(number, panel, 0.13)
            scores = {
                place + shift: score
                for place, length in enumerate(lengths)
                if (score := score_of(s for s in arm.samples if s.length_tokens == length))
            }
            _line_with_intervals(axis, arm, panel, scores)
        axis.set_xlim(-0.5, max(len(lengths), 1) - 0.5)
        axis.set_ylim(-0.04, 1.04)
        axis.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
        draw_boundaries(axis, lengths, original_length, target_length)
        axis.set_xlabel("context length (tokens)")
        axis.set_ylabel(_score_name(panel))
        return "all depths; bars: Wilson 95% intervals"

    return _figure("Accuracy by length", arms, draw, footnote)


def accuracy_by_depth(
    arms: Sequence[Arm],
    *,
    original_length: int,
    lengths: Collection[int] | None = None,
    footnote: str | None = None,
) -> Picture:
    """Draw the mean score by depth with 95% intervals.

    Args:
        lengths: which lengths count together; those beyond the original length when left out, all where there is none.

    Raises:
        ValueError: no arms.
    """

    def draw(axis: Axes, panel: Sequence[Arm]) -> str:
        tested = sorted({sample.length_tokens for arm in panel for sample in arm.samples})
        shown = [n for n in tested if (n > original_length if lengths is None else n in lengths)] or tested
        depths = sorted({s.depth for arm in panel for s in arm.samples if s.length_tokens in shown})
        gap = min((b - a for a, b in itertools.pairwise(depths)), default=0.2)
        for number, arm in enumerate(panel):
            shift = _side_by_side(number, panel, min(0.02, 0.13 * gap))
            scores = {
                depth + shift: score
                for depth in depths
                if (score := score_of(s for s in arm.samples if s.depth == depth and s.length_tokens in shown))
            }
            _line_with_intervals(axis, arm, panel, scores)
        axis.set_xlim(-0.06, 1.06)
        axis.set_ylim(-0.04, 1.04)
        if depths:
            axis.set_xticks(depths, [f"{depth:g}" for depth in depths])
        axis.set_xlabel("depth of the needle (0 = start)")
        axis.set_ylabel(_score_name(panel))
        if not shown:
            return "no samples"
        reach = " to ".join(length_label(length) for length in sorted({shown[0], shown[-1]}))
        return f"at {reach} tokens; 95% intervals"

    return _figure("Accuracy by depth", arms, draw, footnote)


def _score_name(arms: Sequence[Arm]) -> str:
    parts = any(sample.score not in (0.0, 1.0) for arm in arms for sample in arm.scored)
    return "mean score" if parts else "share of right answers"


def _side_by_side(number: int, panel: Sequence[Arm], step: float) -> float:
    """How far an arm's points stand from their place: intervals on top of each other cannot be read."""
    return step * (number - (len(panel) - 1) / 2)


def _line_with_intervals(axis: Axes, arm: Arm, panel: Sequence[Arm], shares: Mapping[float, MeanScore]) -> None:
    places = list(shares)
    values = [share.value for share in shares.values()]
    below = [share.value - share.low for share in shares.values()]
    above = [share.high - share.value for share in shares.values()]
    color = _line_style(arm, panel)[0]
    axis.errorbar(places, values, yerr=[below, above], fmt="none", ecolor=color, elinewidth=1.2, capsize=2.5)
    _line(axis, arm, panel, places, values, every=1)


def _line_style(arm: Arm, panel: Sequence[Arm]) -> tuple[Any, ...]:
    """Colour, dash and marker: a known arm's own, for others what is left; by place where two have one name."""
    names = [other.name for other in panel]
    if len(set(names)) < len(names):
        place = next(number for number, other in enumerate(panel) if other is arm)
        return _OTHER_LINES[place % len(_OTHER_LINES)]
    if arm.name in _LINES:
        return _LINES[arm.name]
    taken = [_LINES[name] for name in names if name in _LINES]
    free = [line for line in _OTHER_LINES if line not in taken]
    return free[[name for name in names if name not in _LINES].index(arm.name) % len(free)]


def _figure(
    title: str, arms: Sequence[Arm], draw: Callable[[Axes, Sequence[Arm]], str], footnote: str | None
) -> Picture:
    if not arms:
        raise ValueError("no arms to draw")
    panels = comparable_panels(arms)
    with drawing_style():
        layout = ConstrainedLayoutEngine(h_pad=0.1)
        legend_rows = max(len(panel) for panel in panels)
        height = (4.3 + 0.16 * max(0, legend_rows - 3)) * len(panels) + 0.3 * bool(footnote)
        figure = Figure(figsize=(4.9, height), layout=layout)
        for axis, panel in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#e6eaef", linewidth=0.8)
            axis.set_axisbelow(True)
            facts = draw(axis, panel)
            if len(panels) > 1 or all(arm.recorded for arm in panel):
                facts = f"{RECORDED_MARK if panel[0].recorded else 'this run'} · {facts}"
            text = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "left", "va": "bottom"}
            axis.annotate(facts, xy=(0, 1), xytext=(0, 29), fontsize=8, color=_MUTED, **text)
            axis.annotate(title, xy=(0, 1), xytext=(0, 41), fontsize=11, fontweight="bold", **text)
            columns = 2 if max(len(_legend(arm)) for arm in panel) < 24 else 1
            axis.legend(
                loc="upper left",
                bbox_to_anchor=(-0.02, -0.17),
                ncols=columns,
                frameon=False,
                fontsize=8,
                handlelength=3.6,
            )
        draw_footnote(figure, footnote)
        return render(figure)


def _legend(arm: Arm) -> str:
    return f"{arm.name}: {arm.label}{' (recorded)' if arm.recorded else ''}"


def _line(
    axis: Axes, arm: Arm, panel: Sequence[Arm], xs: list[float], ys: list[float], every: int | None = None
) -> None:
    color, dash, marker = _line_style(arm, panel)
    axis.plot(
        xs,
        ys,
        color=color,
        linestyle=dash,
        linewidth=1.7,
        marker=marker,
        markersize=5,
        markerfacecolor="white" if arm.recorded else color,
        markevery=every or max(1, len(xs) // _NUM_MARKERS),
        label=_legend(arm),
    )


def _place_lengths(axis: Axes, longest: float, original_length: int, target_length: int) -> None:
    # A target far beyond the measured positions would squash the curve, so its line stands at the edge with an arrow.
    near = [length for length in (original_length, target_length) if length <= longest * _FAR_FACTOR]
    right = max([longest, *near]) * 1.01
    axis.set_xlim(0, right)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_label(round(value))))
    # Ticks at multiples of a power of two, because decimal ones carry labels like 4.88K.
    axis.xaxis.set_major_locator(MultipleLocator(2 ** math.ceil(math.log2(right / 9))))
    for name, length, dashed in (("original", original_length, True), ("target", target_length, False)):
        if length <= right:
            draw_boundary(axis, length, f"{name} {length_label(length)}", dashed=dashed)
        else:
            draw_boundary(axis, right, f"{name} {length_label(length)} →", dashed=dashed)
