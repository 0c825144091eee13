"""The report of a run: one self-contained page, the pictures as files, the numbers as CSV and JSON.

`index.html` is written last, so a page never announces files that are not there. One page shows all tasks; pictures of
a single task lie in the folder itself, those of several in a folder each below `tasks`. Everything here is derived from
samples and can be made again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from ctxext.evaluation.arms import Arm, Coverage, arms_by_origin, coverage_of, tasks_of, without_controls
from ctxext.evaluation.cells import Over, length_label
from ctxext.evaluation.conclusions import Statement, draw_conclusions, table_rows
from ctxext.evaluation.controls import Controls, controls_of
from ctxext.evaluation.curves import (
    accuracy_by_depth,
    accuracy_by_length,
    has_losses,
    loss_by_position,
    perplexity_by_position,
)
from ctxext.evaluation.failures import wrong_examples
from ctxext.evaluation.gains import task_gains
from ctxext.evaluation.heatmap import Picture, heatmap
from ctxext.evaluation.page import (
    Curve,
    FileLink,
    TaskGain,
    TaskView,
    data_uri,
    grid_view,
    has_depths,
    overview_scores,
    render_page,
    task_view,
)
from ctxext.evaluation.statistics import MeanScore, Proportion
from ctxext.evaluation.store import SampleResult, score_of
from ctxext.evaluation.suite import stored_suite
from ctxext.evaluation.tables import cells_table
from ctxext.evaluation.training_view import TrainingRecord, TrainingView, training_view
from ctxext.files import canonical_json, write_bytes_atomic, write_json_atomic, write_text_atomic

_INTERVALS = "Intervals are Wilson 95% intervals."
_ON_THE_PAGE = "Intervals, depths and every task are on the page."
_MAX_ROWS = 30
_ARM_WIDTH = 20
_MAX_COLUMNS = 6
_CURVE_TITLES = {
    "loss_by_position": "Mean next-token loss over the position, on prompts common to the arms drawn together",
    "perplexity_by_position": "Perplexity of plain text over the position",
    "accuracy_by_length": "Mean score by context length, all depths together",
    "training_curves": "Loss, gradient norm and learning rate over the steps of training",
    "attention_entropy": "Attention entropy by layer and head, first and last look, on queries of training windows",
    "long_range_share": "Share of the attention that goes farther than the original length, by layer",
    "accuracy_by_depth": "Mean score by depth of the needle, beyond the original length where it was measured",
}
_FILE_TITLES = {"heatmaps": "all arms", "heatmaps_by_position": "all arms by token position"}


@dataclass(frozen=True)
class ReportFacts:
    """What the page says besides the samples.

    Attributes:
        model_description: what kind of weights these are ("instruction-tuned, restored from 4-bit weights").
        windows: full-length or skip-wise, with the sizes.
        facts_share: share of the training windows that carried synthetic facts with questions, 0 to 1.
        facts_style: how those facts were worded.
        seconds: wall time by stage.
        target_reached: whether the training positions reached the target length; None when nothing was trained.
        command: how to repeat it.
    """

    title: str
    model: str
    method: str
    original_length: int
    target_length: int
    windows: str
    suite: dict[str, Any]
    plan_id: str
    model_description: str | None = None
    facts_share: float | None = None
    facts_style: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    target_reached: bool | None = None
    command: str | None = None

    @property
    def answer_tokens(self) -> int:
        """Room for the longest answer of the suite's tasks, which belongs to the measured length."""
        try:
            return stored_suite(self.suite).num_answer_tokens
        except ValidationError:  # a suite of another version of ctxext
            return int(self.suite.get("max_new_tokens") or 0)


def write_report(
    folder: Path,
    facts: ReportFacts,
    arms: Sequence[Arm],
    *,
    excerpts: Mapping[str, str] | None = None,
    perplexity: Mapping[str, Mapping[str, Any]] | None = None,
    over: Over = "depth",
    training: TrainingRecord | None = None,
) -> Path:
    """Write the page, pictures, CSV and JSON into `folder` and return the page's path.

    Args:
        arms: with the samples of all tasks; the page has a section for each.
        excerpts: text around the needle by sample id or prompt hash, for the `shown_samples`.
        perplexity: stored perplexity (`perplexity.json`) by name of the live arm.
        over: what the rows of the pictures on disk are, `depth` or `position`; the page shows both.
        training: how the extended arm was trained, by the lines that it wrote.

    Raises:
        ValueError: no arms, or the same arm twice.
        ResourceError: the disk is full or not writable.
    """
    statements = conclusions(facts, arms)
    texts = {name: result for name, result in (perplexity or {}).items() if result.get("blocks")}
    trained = None if training is None else training_view(training)
    pictures = _pictures(facts, arms, texts, over) | ({} if trained is None else trained.pictures)
    _remove_stale(folder, pictures)
    for name, picture in pictures.items():
        write_bytes_atomic(folder / f"{name}.png", picture.png)
        write_bytes_atomic(folder / f"{name}.svg", picture.svg)
    write_text_atomic(folder / "cells.csv", cells_csv(arms, coverage(facts, arms)))
    write_json_atomic(folder / "summary.json", summary(facts, arms, statements, perplexity=perplexity))
    page = folder / "index.html"
    write_text_atomic(page, _page(facts, arms, statements, pictures, excerpts or {}, texts, trained))
    return page


def conclusions(facts: ReportFacts, arms: Sequence[Arm]) -> list[Statement]:
    """Everything that may be said about these arms."""
    return draw_conclusions(
        arms,
        original_length=facts.original_length,
        target_length=facts.target_length,
        answer_tokens=facts.answer_tokens,
    )


def coverage(facts: ReportFacts, arms: Sequence[Arm]) -> Coverage:
    """How far these arms were tested."""
    return coverage_of(arms, facts.target_length, facts.answer_tokens)


def shown_samples(arms: Sequence[Arm]) -> list[tuple[Arm, SampleResult]]:
    """The wrong answers that the page shows, for whoever rebuilds the text around their needles."""
    return [
        (arm, sample)
        for task in tasks_of(arms)
        for arm in arms
        for sample in wrong_examples(arm.of_task(task))
        if not arm.is_control_task(task)
    ]


def terminal_table(arms: Sequence[Arm], facts: ReportFacts) -> tuple[Table, list[str]]:
    """The end of a run in the terminal: a table, and the sentences that matter most.

    One task has arms as rows and lengths as columns; several tasks have a row each, with the arms one above the other.

    Raises:
        ValueError: the same arm twice.
    """
    statements = conclusions(facts, arms)
    limit = coverage(facts, arms)
    tasks = tasks_of(without_controls(arm) for arm in arms)
    title = f"Right answers by length (original {facts.original_length:,}, target {facts.target_length:,})"
    if not limit.reached:
        title += f"; tested up to {limit.longest_tokens:,} only"
    table = Table(title=title, title_justify="left", caption_justify="left", min_width=min(len(title), 78))
    if len(tasks) > 1:
        table.title = title.replace("Right answers", "Mean score")
        _fill_by_task(table, arms, facts, tasks)
    else:
        _fill_by_arm(table, arms, facts)
    table.caption = f"* beyond the original length. {_INTERVALS if len(tasks) == 1 else _ON_THE_PAGE}"
    topics = ("short_loss", "coverage", "chance", "prompts")
    brief = [s.sentence for s in statements if s.headline or (s.topic in topics and not s.recorded)]
    note = retrieval_note(facts)
    return table, [*brief, note] if note else brief


def _fill_by_arm(table: Table, arms: Sequence[Arm], facts: ReportFacts) -> None:
    rows = table_rows(arms, original_length=facts.original_length)
    lengths = sorted({length for row in rows for length in row.by_length})
    shown = _columns(lengths)
    table.add_column("arm", no_wrap=True, min_width=8)
    for length in shown:
        table.add_column(_column_name(length, facts), justify="right")
    loss_length = next((row.loss_length_tokens for row in rows if row.loss_length_tokens), None)
    if loss_length:
        table.add_column(f"loss at {length_label(loss_length)}", justify="right")
    for row in rows:
        name = _arm_name(row.arm)
        cells = [_brief(row.by_length.get(length)) for length in shown]
        loss = [f"{row.mean_loss:.3f}" if row.mean_loss is not None else "-"] if loss_length else []
        table.add_row(escape(name), *cells, *loss)


def _fill_by_task(table: Table, arms: Sequence[Arm], facts: ReportFacts, tasks: Sequence[str]) -> None:
    measured = [without_controls(arm) for arm in arms]
    lengths = sorted({sample.length_tokens for arm in measured for sample in arm.samples})
    shown = _columns(lengths)
    table.add_column("task", no_wrap=True)
    table.add_column("arm", no_wrap=True, max_width=_ARM_WIDTH)
    for length in shown:
        table.add_column(_column_name(length, facts), justify="right", no_wrap=True)
    in_detail = len(tasks) * len(arms) <= _MAX_ROWS
    for task in tasks if in_detail else ():
        for number, arm in enumerate(measured):
            scores = [score_of(s for s in arm.samples if (s.task, s.length_tokens) == (task, n)) for n in shown]
            cells = [f"{score.value:.2f}" if score else "-" for score in scores]
            table.add_row("" if number else escape(task), escape(_arm_name(arm)), *cells)
    _, means = overview_scores(measured, tasks)
    for number, (arm, texts) in enumerate(means):
        values = dict(zip(lengths, texts, strict=True))
        name = "" if number else f"mean of {len(tasks)}"
        table.add_row(name, escape(_arm_name(arm)), *(values[n].partition(" ")[0] for n in shown))


def _arm_name(arm: Arm) -> str:
    return f"{arm.name}{' (recorded)' if arm.recorded else ''}"


def _columns(lengths: Sequence[int]) -> list[int]:
    """The shortest length and the longest ones, as many as a terminal of 80 columns holds."""
    if len(lengths) <= _MAX_COLUMNS:
        return list(lengths)
    return [lengths[0], *lengths[1 - _MAX_COLUMNS :]]


def _column_name(length: int, facts: ReportFacts) -> str:
    return f"{length_label(length)}{' *' if length > facts.original_length else ''}"


def retrieval_note(facts: ReportFacts) -> str | None:
    """What must stand beside the numbers when synthetic facts were part of the training data."""
    if not facts.facts_share:
        return None
    style = f" ({facts.facts_style})" if facts.facts_style else ""
    return (
        f"This run trained extension and retrieval together: {facts.facts_share:.0%} of the training windows carried "
        f"synthetic facts with questions{style}. Only the comparison with the control arm beyond the original length "
        "tells the two apart."
    )


def cells_csv(arms: Sequence[Arm], limit: Coverage | None = None) -> str:
    """One line a cell and arm; missing samples are counted and not scored as wrong."""
    return cells_table(arms, limit)


def summary(
    facts: ReportFacts,
    arms: Sequence[Arm],
    statements: Sequence[Statement],
    *,
    perplexity: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The page's content for programs."""
    rows = table_rows(arms, original_length=facts.original_length)
    limit = coverage(facts, arms)
    table = [
        {
            "arm": row.arm.name,
            "label": row.arm.label,
            "recorded": row.arm.recorded,
            "identity_hash": row.arm.run.get("identity_hash"),
            "num_missing": row.num_missing,
            "num_haystacks": row.arm.num_haystacks,
            "lengths": {str(length): _share(share) for length, share in row.by_length.items()},
            "loss_length_tokens": row.loss_length_tokens,
            "mean_loss": row.mean_loss,
            "tasks": _task_scores(row.arm),
            "controls": _controls(controls_of(arm, facts.original_length)),
        }
        for arm, row in zip(arms, rows, strict=True)
    ]
    return {
        "facts": asdict(facts),
        "retrieval_note": retrieval_note(facts),
        "coverage": {**asdict(limit), "reached": limit.reached, "sentence": limit.sentence},
        "statements": [{"sentence": statement.sentence, **asdict(statement)} for statement in statements],
        "table": table,
        "perplexity": {
            name: {key: value for key, value in result.items() if key not in ("blocks", "documents")}
            for name, result in (perplexity or {}).items()
        },
    }


def picture_name(arm: Arm) -> str:
    """File stem of one arm's heatmap; an arm's name may hold anything."""
    return f"heatmap-{'recorded-' if arm.recorded else ''}{_safe(arm.name)}"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "arm"


def _controls(controls: Controls) -> dict[str, Any]:
    return {
        "chance": None if controls.chance is None else _share(controls.chance),
        "shortest_length_tokens": controls.shortest_tokens,
        "shortest_length": None if controls.shortest is None else _score(controls.shortest),
        **{
            f"degenerate_{place}": None if found is None else {**_share(found.share), "kinds": found.kinds}
            for place, found in (("inside", controls.inside), ("beyond", controls.beyond))
        },
    }


def _task_scores(arm: Arm) -> dict[str, dict[str, Any]]:
    scores: dict[str, dict[str, Any]] = {}
    for task in arm.tasks:
        samples = arm.of_task(task).samples
        lengths = sorted({sample.length_tokens for sample in samples})
        found = {length: score_of(s for s in samples if s.length_tokens == length) for length in lengths}
        scores[task] = {str(length): _score(score) for length, score in found.items() if score is not None}
    return scores


def _remove_stale(folder: Path, pictures: Mapping[str, Picture]) -> None:
    """Pictures of an earlier report, which may have had other arms or tasks."""
    for stale in [
        *folder.glob("heatmap*"),
        *folder.glob("*_by_*"),
        *folder.glob("attention_*"),
        *folder.glob("long_*"),
    ]:
        if stale.suffix in (".png", ".svg") and stale.stem not in pictures:
            stale.unlink()
    wanted = {name.split("/")[1] for name in pictures if "/" in name}
    for task in folder.glob("tasks/*"):
        if task.is_dir() and task.name not in wanted:
            shutil.rmtree(task)
    if not wanted and (folder / "tasks").is_dir():
        (folder / "tasks").rmdir()


def _pictures(
    facts: ReportFacts, arms: Sequence[Arm], perplexity: Mapping[str, Mapping[str, Any]], over: Over
) -> dict[str, Picture]:
    """All pictures by file stem below the report's folder."""
    note = coverage(facts, arms).footnote
    tasks = tasks_of(arms)
    arms_over: Over = "task" if len(tasks) > 1 else over
    limits: Any = {
        "original_length": facts.original_length,
        "target_length": facts.target_length,
        "footnote": note,
    }
    pictures = {picture_name(a): heatmap([a], **limits, alike=arms, over=arms_over) for a in arms}
    measured = [without_controls(arm) for arm in arms]
    if has_losses(measured):
        pictures["loss_by_position"] = loss_by_position(measured, **limits)
    if any(arm.name in perplexity and not arm.recorded for arm in arms):
        pictures["perplexity_by_position"] = perplexity_by_position(arms, perplexity, **limits)
    if len(tasks) > 1:
        pictures["heatmaps"] = heatmap(arms, **limits, over="task")
    for task in tasks:
        members = [arm.of_task(task) for arm in arms if task in arm.tasks]
        if len(tasks) > 1 and members[0].is_control_task(task):
            continue  # a row of the picture of all tasks says it
        stem = _task_folder(task, tasks)
        pictures[f"{stem}accuracy_by_length"] = accuracy_by_length(members, **limits)
        if has_depths(members):
            pictures[f"{stem}accuracy_by_depth"] = accuracy_by_depth(
                members, original_length=facts.original_length, footnote=note
            )
        if has_depths(members) or len(tasks) == 1:
            pictures[f"{stem}heatmaps"] = heatmap(members, **limits, over=over)
    if len(tasks) == 1 and has_depths(measured) and over == "depth":
        pictures["heatmaps_by_position"] = heatmap(arms, **limits, over="position")
    return pictures


def _task_folder(task: str, tasks: Sequence[str]) -> str:
    """Where the pictures of a task lie; those of the only task in the report's own folder."""
    if len(tasks) < 2:
        return ""
    names = [_safe(other) for other in tasks]
    name = _safe(task) if names.count(_safe(task)) == 1 else f"{_safe(task)}-{list(tasks).index(task)}"
    return f"tasks/{name}/"


def _brief(share: Proportion | None) -> str:
    if share is None:
        return "-"
    ends = "-".join(f"{end:.2f}".removeprefix("0") for end in (share.low, share.high))  # fits into 80 columns
    return f"{share.num_successes}/{share.num_trials}\n{ends}"


def _share(share: Proportion) -> dict[str, Any]:
    return {"num_right": share.num_successes, "num_samples": share.num_trials, "wilson_95": [share.low, share.high]}


def _score(score: MeanScore) -> dict[str, Any]:
    return {
        "score": score.value,
        "num_samples": score.num_samples,
        "num_clusters": score.num_clusters,
        "interval_95": [score.low, score.high],
    }


def _page(
    facts: ReportFacts,
    arms: Sequence[Arm],
    statements: Sequence[Statement],
    pictures: Mapping[str, Picture],
    excerpts: Mapping[str, str],
    perplexity: Mapping[str, Mapping[str, Any]],
    trained: TrainingView | None,
) -> str:
    original, tasks = facts.original_length, tasks_of(arms)
    measured = [without_controls(arm) for arm in arms]
    real_tasks = tasks_of(measured)
    rows = table_rows(arms, original_length=original)
    origins = {recorded: [arm for arm in arms if arm.recorded == recorded] for recorded in (False, True)}
    several = len(tasks) > 1
    top = ["loss_by_position", "perplexity_by_position"]
    return render_page(
        facts=facts,
        note=retrieval_note(facts),
        statements=statements,
        coverage=coverage(facts, arms),
        controls=[controls_of(arm, original) for arm in arms],
        tasks=[_task_view(task, tasks, facts, arms, pictures) for task in tasks],
        overview=[grid_view(arm, origins[arm.recorded], "task", original) for arm in arms] if several else [],
        means=overview_scores(measured, real_tasks) if len(real_tasks) > 1 else ([], []),
        gains=_task_gains(measured, real_tasks, original) if len(real_tasks) > 1 else [],
        excerpts=excerpts,
        loss=(
            next((row.loss_length_tokens for row in rows if row.loss_length_tokens), None),
            {(row.arm.name, row.arm.recorded): row.mean_loss for row in rows},
        ),
        perplexity=[(arm.name, perplexity[arm.name]) for arm in origins[False] if arm.name in perplexity],
        files=[FileLink("heatmaps", "all arms in one picture"), *(FileLink(picture_name(a), a.name) for a in arms)],
        curves=[_curve(name, "", pictures) for name in top if name in pictures],
        training=trained,
        training_curves=[_curve(name, "", pictures) for name in (trained.pictures if trained is not None else ())],
        made=_how_it_was_made(facts),
    )


def _task_view(
    task: str, tasks: Sequence[str], facts: ReportFacts, arms: Sequence[Arm], pictures: Mapping[str, Picture]
) -> TaskView:
    members = [arm.of_task(task) for arm in arms if task in arm.tasks]
    folder = _task_folder(task, tasks)
    curves = [name for name in ("accuracy_by_length", "accuracy_by_depth") if f"{folder}{name}" in pictures]
    files = [FileLink(f"{folder}{name}", text) for name, text in _FILE_TITLES.items() if f"{folder}{name}" in pictures]
    findings: list[Statement] = []
    if len(tasks) > 1 and not members[0].is_control_task(task):
        found = conclusions(facts, members)
        findings = [s for s in found if s.topic in ("effective_length", "tail")]
    return task_view(
        task,
        members,
        original_length=facts.original_length,
        curves=[_curve(name, folder, pictures) for name in curves],
        files=files,
        findings=findings,
    )


def _task_gains(arms: Sequence[Arm], tasks: Sequence[str], original_length: int) -> list[TaskGain]:
    return [
        TaskGain(task, name, found)
        for group in arms_by_origin(arms)
        for (task, name), found in task_gains(group, tasks, original_length).items()
    ]


def _curve(name: str, folder: str, pictures: Mapping[str, Picture]) -> Curve:
    return Curve(FileLink(f"{folder}{name}", _CURVE_TITLES[name]), data_uri(pictures[f"{folder}{name}"]))


def _how_it_was_made(facts: ReportFacts) -> list[tuple[str, list[tuple[str, str]]]]:
    seconds = [(stage, f"{value:,.1f} s") for stage, value in facts.seconds.items()]
    if len(seconds) > 1:
        seconds.append(("together", f"{sum(facts.seconds.values()):,.1f} s"))
    groups = [
        ("Time", seconds),
        ("Suite", _flat(facts.suite)),
        ("Environment", _flat(facts.environment)),
    ]
    return [(name, entries) for name, entries in groups if entries]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    entries: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            entries += _flat(value, f"{prefix}{key}.")
        else:
            entries.append((f"{prefix}{key}", value if isinstance(value, str) else canonical_json(value)))
    return entries
