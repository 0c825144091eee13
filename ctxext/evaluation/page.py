"""`index.html`: what the page shows, made ready for its template.

The page holds no script and loads nothing: curves are embedded, heatmaps are tables (exact numbers on every cell, and
readable on a phone), switches are radio buttons that the style sheet follows, and a Content-Security-Policy forbids the
rest, because answers of a model are foreign text.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import markupsafe
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ctxext.evaluation.arms import Arm, Coverage
from ctxext.evaluation.cells import NOT_ASKED, CellCount, Over, Place, count, frame_of, length_label
from ctxext.evaluation.controls import Controls
from ctxext.evaluation.failures import failure_counts, failure_kind, wrong_examples
from ctxext.evaluation.gains import Evidence
from ctxext.evaluation.heatmap import COLOR_MAP, RECORDED_MARK, Picture, ink_on
from ctxext.evaluation.statement import Statement
from ctxext.evaluation.statistics import MeanScore
from ctxext.evaluation.store import SampleResult, score_of
from ctxext.evaluation.tables import cells_of
from ctxext.evaluation.training_view import TrainingView

ANSWER_CHARACTERS = 300
EXCERPT_CHARACTERS = 900


@dataclass(frozen=True)
class CellView:
    """A table cell of a heatmap; no colour where nothing is scored."""

    text: str
    note: str
    hover: str
    color: str | None
    ink: str
    is_outside: bool = False


@dataclass(frozen=True)
class GridView:
    """A heatmap as a table; the original length ends before column `boundary`."""

    arm: Arm
    over: Over
    lengths: list[int]
    boundary: int
    rows: list[tuple[str, list[CellView]]]


@dataclass(frozen=True)
class ScoreView:
    """A score in a table: '8 of 8' or '0.62', with its interval and what it rests on."""

    text: str
    interval: str
    hover: str


@dataclass(frozen=True)
class FileLink:
    """A picture on disk beside the page, as PNG and SVG."""

    stem: str
    title: str


@dataclass(frozen=True)
class Curve:
    """An embedded picture with its files."""

    file: FileLink
    uri: str


@dataclass(frozen=True)
class TaskView:
    """Everything about one task (or about the only one).

    Attributes:
        controls_only: the task is the control without a needle.
        grids: by what the rows are (`depth`, `position`), one table an arm.
        findings: sentences about this task alone; empty where the page is about one task.
    """

    name: str
    arms: list[Arm]
    lengths: list[int]
    inside: int
    scores: list[tuple[Arm, list[ScoreView | None]]]
    grids: dict[Over, list[GridView]]
    curves: list[Curve]
    files: list[FileLink]
    cells: list[tuple[Arm, list[tuple[int, float, CellCount]]]]
    examples: list[tuple[Arm, list[SampleResult], dict[str, int]]]
    is_saliency: bool
    findings: list[Statement]
    controls_only: bool = False


@dataclass(frozen=True)
class TaskGain:
    """A line of the table of tasks beyond the original length."""

    task: str
    arm: str
    evidence: Evidence


def grid_view(arm: Arm, alike: Sequence[Arm], over: Over, original_length: int) -> GridView:
    """A heatmap's cells, in the frame that the arms `alike` share."""
    frame = frame_of(alike, over)
    counts = frame.cells(arm)
    rows = []
    for place in frame.places:
        cells = []
        for length in frame.lengths:
            found = counts.get((length, place), NOT_ASKED)
            outside = frame.is_outside(length, place)
            cells.append(_cell_view(found, f"{_where(over, place)}, {length:,} tokens", outside))
        rows.append((frame.label(place), cells))
    return GridView(arm, over, frame.lengths, _num_inside(frame.lengths, original_length), rows)


def _where(over: Over, place: Place) -> str:
    if over == "task":
        return str(place)
    return f"depth {place:g}" if over == "depth" else f"position from {int(float(place)):,}"


def _cell_view(found: CellCount, where: str, outside: bool) -> CellView:
    if outside:
        return CellView("", "", "", None, "", True)
    hover = f"{where}: {found.facts()}"
    if found.num_scored == 0:
        hover = hover if found.num_missing else ""
        text = found.reasons[0] if found.reasons else ""
        return CellView(text, "", hover, None, "")
    color = colormaps[COLOR_MAP](found.value)
    marks = [f"†{found.num_degenerate}"] * bool(found.num_degenerate)
    marks += [f"+{found.num_missing} missing"] * bool(found.num_missing)
    text = found.text().partition("\n")[0]
    return CellView(text, " ".join(marks), hover, to_hex(color), ink_on(color))


def _num_inside(lengths: Sequence[int], original_length: int) -> int:
    return sum(length <= original_length for length in lengths)


def score_view(samples: Sequence[SampleResult]) -> ScoreView | None:
    """A score with its interval; None where nothing is scored."""
    found = count(samples)
    if found.score is None:
        return None
    text = f"{found.num_right} of {found.num_scored}" if found.all_or_nothing else f"{found.score.value:.2f}"
    return ScoreView(text, interval(found.score), found.facts())


def interval(score: MeanScore) -> str:
    """Both ends, with an en dash between them."""
    return f"{score.low:.2f}\N{EN DASH}{score.high:.2f}"


def task_view(
    task: str,
    arms: Sequence[Arm],
    *,
    original_length: int,
    curves: Sequence[Curve],
    files: Sequence[FileLink],
    findings: Sequence[Statement] = (),
) -> TaskView:
    """The view of one task from arms that hold its samples alone."""
    lengths = sorted({sample.length_tokens for arm in arms for sample in arm.samples})
    overs: list[Over] = ["depth", "position"] if has_depths(arms) else ["depth"]
    origins = {recorded: [arm for arm in arms if arm.recorded == recorded] for recorded in (False, True)}
    return TaskView(
        name=task,
        arms=list(arms),
        lengths=lengths,
        inside=_num_inside(lengths, original_length),
        scores=[(arm, [score_view([s for s in arm.samples if s.length_tokens == n]) for n in lengths]) for arm in arms],
        grids={over: [grid_view(arm, origins[arm.recorded], over, original_length) for arm in arms] for over in overs},
        curves=list(curves),
        files=list(files),
        cells=[
            (arm, [(cell.length_tokens, cell.depth, count(members)) for cell, members in cells_of(arm.samples)])
            for arm in arms
        ],
        examples=[(arm, wrong_examples(arm), failure_counts(arm)) for arm in arms],
        is_saliency=any(arm.is_saliency(task) for arm in arms),
        findings=list(findings),
        controls_only=any(arm.is_control_task(task) for arm in arms),
    )


def has_depths(arms: Sequence[Arm]) -> bool:
    """Whether needles were put at more than one depth."""
    return len({sample.depth for arm in arms for sample in arm.samples}) > 1


def overview_scores(arms: Sequence[Arm], tasks: Sequence[str]) -> tuple[list[int], list[tuple[Arm, list[str]]]]:
    """Mean over the tasks of their mean scores by length, each task counting once; '-' where a task is missing."""
    lengths = sorted({s.length_tokens for arm in arms for s in arm.samples if s.task in tasks})
    rows = []
    for arm in arms:
        texts = []
        for length in lengths:
            scores = [score_of(s for s in arm.samples if (s.task, s.length_tokens) == (task, length)) for task in tasks]
            known = [score.value for score in scores if score is not None]
            part = f" ({len(known)} of {len(tasks)} tasks)" if len(known) < len(tasks) else ""
            texts.append(f"{sum(known) / len(known):.3f}{part}" if known else "-")
        rows.append((arm, texts))
    return lengths, rows


def render_page(
    *,
    facts: Any,
    note: str | None,
    statements: Sequence[Statement],
    coverage: Coverage,
    controls: Sequence[Controls],
    tasks: Sequence[TaskView],
    overview: Sequence[GridView],
    means: tuple[list[int], list[tuple[Arm, list[str]]]],
    gains: Sequence[TaskGain],
    excerpts: Mapping[str, str],
    loss: tuple[int | None, dict[tuple[str, bool], float | None]],
    perplexity: Sequence[tuple[str, Mapping[str, Any]]],
    files: Sequence[FileLink],
    curves: Sequence[Curve],
    training: TrainingView | None,
    training_curves: Sequence[Curve],
    made: Sequence[tuple[str, list[tuple[str, str]]]],
) -> str:
    """The whole page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ctxext.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.filters["whole"] = _whole_intervals
    environment.filters["short"] = length_label
    environment.tests["beyond"] = lambda length: length > facts.original_length
    return environment.get_template("report.html.j2").render(
        facts=facts,
        note=note,
        headlines=[s for s in statements if s.headline],
        findings=[s for s in statements if not s.headline and s.topic != "coverage"],
        coverage=coverage,
        controls=controls,
        tasks=tasks,
        overview=overview,
        means=means,
        gains=gains,
        excerpt=lambda sample: excerpt_of(sample, excerpts),
        failure=failure_kind,
        loss_length=loss[0],
        losses=loss[1],
        perplexity=perplexity,
        files=files,
        curves=curves,
        training=training,
        training_curves=training_curves,
        made=made,
        recorded_mark=RECORDED_MARK,
        scale=[to_hex(colormaps[COLOR_MAP](step / 10)) for step in range(11)],
    )


def data_uri(picture: Picture) -> str:
    """A picture inside the page."""
    svg = re.sub(rb"<!--.*?-->|<metadata>.*?</metadata>", b"", picture.svg, flags=re.DOTALL)
    svg = re.sub(rb">\s+<", b"><", svg)  # the text of a picture is paths, so no space between tags means anything
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def visible(text: str, limit: int = ANSWER_CHARACTERS) -> str:
    """Foreign text fit for a page: shortened, and invisible or direction-changing characters written as codes."""
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text[:limit])
    return shown + ("…" if len(text) > limit else "")


def excerpt_of(sample: SampleResult, excerpts: Mapping[str, str]) -> Markup | None:
    """The prompt around the needle, escaped, expected answers marked; None where it was not rebuilt."""
    text = excerpts.get(sample.prompt_sha256) or excerpts.get(sample.sample_id)
    if not text:
        return None
    shown = visible(text, EXCERPT_CHARACTERS)
    wanted = [re.escape(answer) for answer in sample.answers or [sample.expected] if answer]
    if not wanted:
        return markupsafe.escape(shown)
    parts = re.split(f"({'|'.join(wanted)})", shown)
    marked = [
        Markup("<mark>{}</mark>").format(part) if i % 2 else markupsafe.escape(part) for i, part in enumerate(parts)
    ]
    return Markup("").join(marked)


def _whole_intervals(text: str) -> Markup:
    """Keep '(0.21-1.00)' on one line; the text is escaped first."""
    return Markup(re.sub(r"\([\d.]+-[\d.]+\)", r'<span class="whole">\g<0></span>', str(markupsafe.escape(text))))
