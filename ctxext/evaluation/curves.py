"""Loss by position and accuracy by length as pictures, one line an arm.

Arms of one panel are compared only over prompts that all of them answered: another text has another loss. Each point
averages all of these prompts that are long enough to reach it, so the far end rests on the long prompts alone. Live
and recorded arms get a panel each when both have something to compare. Lines differ in dash and marker, not only in
colour.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MultipleLocator

from ctxext.evaluation.conclusions import Arm, block_spans
from ctxext.evaluation.heatmap import (
    RECORDED_MARK,
    Picture,
    draw_boundaries,
    draw_boundary,
    drawing_style,
    length_label,
    render,
)
from ctxext.evaluation.store import SampleResult, by_length

# Colours of Okabe and Ito, told apart with every common kind of colour blindness; dash and marker repeat the message.
_LINES = {
    "base": ("#5f6670", (0, (1, 1.6)), "o"),
    "untrained": ("#b87a00", (0, (5, 1.5, 1, 1.5)), "^"),
    "control": ("#9b3d78", (0, (5, 2)), "s"),
    "extended": ("#0072b2", "solid", "D"),
}
_MUTED = "#59636e"
_NUM_MARKERS = 8
_FAR_FACTOR = 1.5


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


def loss_by_position(arms: Sequence[Arm], *, original_length: int, target_length: int) -> Picture:
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
            _line(axis, arm, [x for x, _ in points], [y for _, y in points])
        _place_lengths(axis, longest, original_length, target_length)
        axis.set_xlabel("position in the context (tokens)")
        axis.set_ylabel("loss (nats per token)")
        plural = "s" * (len(shared) != 1)
        return f"{len(shared)} common prompt{plural}" if shared else "no prompt with losses in common"

    return _figure("Loss by position", arms, draw)


def accuracy_by_length(arms: Sequence[Arm], *, original_length: int, target_length: int) -> Picture:
    """Draw the share of right answers by length, pooled over depths, with Wilson 95% intervals.

    Raises:
        ValueError: no arms.
    """

    def draw(axis: Axes, panel: Sequence[Arm]) -> str:
        lengths = sorted({sample.length_tokens for arm in panel for sample in arm.samples})
        for number, arm in enumerate(panel):
            # Side by side, because intervals on top of each other cannot be read.
            shift = 0.13 * (number - (len(panel) - 1) / 2)
            shares = by_length(arm.samples)
            places = [lengths.index(length) + shift for length in shares]
            values = [share.value for share in shares.values()]
            below = [share.value - share.low for share in shares.values()]
            above = [share.high - share.value for share in shares.values()]
            color = _LINES[arm.name][0]
            axis.errorbar(places, values, yerr=[below, above], fmt="none", ecolor=color, elinewidth=1.2, capsize=2.5)
            _line(axis, arm, places, values, every=1)
        axis.set_xlim(-0.5, max(len(lengths), 1) - 0.5)
        axis.set_ylim(-0.04, 1.04)
        axis.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
        draw_boundaries(axis, lengths, original_length, target_length)
        axis.set_xlabel("context length (tokens)")
        axis.set_ylabel("share of right answers")
        return "all depths; bars: Wilson 95% intervals"

    return _figure("Accuracy by length", arms, draw)


def _figure(title: str, arms: Sequence[Arm], draw: Callable[[Axes, Sequence[Arm]], str]) -> Picture:
    if not arms:
        raise ValueError("no arms to draw")
    panels = comparable_panels(arms)
    with drawing_style():
        layout = ConstrainedLayoutEngine(h_pad=0.1)
        figure = Figure(figsize=(4.9, 4.3 * len(panels)), layout=layout)
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
                bbox_to_anchor=(-0.02, -0.16),
                ncols=columns,
                frameon=False,
                fontsize=8,
                handlelength=3.6,
            )
        return render(figure)


def _legend(arm: Arm) -> str:
    return f"{arm.name}: {arm.label}{' (recorded)' if arm.recorded else ''}"


def _line(axis: Axes, arm: Arm, xs: list[float], ys: list[float], every: int | None = None) -> None:
    color, dash, marker = _LINES[arm.name]
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
