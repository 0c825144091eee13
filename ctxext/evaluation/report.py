"""The report of a run: one self-contained page, the pictures as files, the numbers as CSV and JSON.

The page holds no script and loads nothing: pictures are embedded, and a Content-Security-Policy forbids the rest,
because answers of a model are foreign text. `index.html` is written last, so a page never announces files that are
not there. Everything here is derived from samples and can be made again.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from ctxext.evaluation.conclusions import Arm, Statement, arms_by_origin, draw_conclusions, table_rows
from ctxext.evaluation.curves import accuracy_by_depth, accuracy_by_length, loss_by_position
from ctxext.evaluation.heatmap import RECORDED_MARK, Picture, heatmap, length_label
from ctxext.evaluation.statistics import Proportion
from ctxext.evaluation.store import SampleResult, grid_of
from ctxext.files import canonical_json, write_bytes_atomic, write_json_atomic, write_text_atomic

NUM_EXAMPLES = 5
_ANSWER_CHARACTERS = 300
_CSV_COLUMNS = (
    "arm recorded task length_tokens depth num_right num_samples num_missing num_degenerate wilson_low wilson_high"
)
_INTERVALS = "Intervals are Wilson 95% intervals."


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


def write_report(folder: Path, facts: ReportFacts, arms: Sequence[Arm]) -> Path:
    """Write the page, pictures, CSV and JSON into `folder` and return the page's path.

    Raises:
        ValueError: no arms, or the same arm twice.
        ResourceError: the disk is full or not writable.
    """
    statements = _statements(facts, arms)
    pictures = _pictures(facts, arms)
    for stale in folder.glob("heatmap-*"):
        # An earlier report of this folder may have had other arms.
        if stale.suffix in (".png", ".svg") and stale.stem not in pictures:
            stale.unlink()
    for name, picture in pictures.items():
        write_bytes_atomic(folder / f"{name}.png", picture.png)
        write_bytes_atomic(folder / f"{name}.svg", picture.svg)
    write_text_atomic(folder / "cells.csv", cells_csv(arms))
    write_json_atomic(folder / "summary.json", summary(facts, arms, statements))
    page = folder / "index.html"
    write_text_atomic(page, _page(facts, arms, statements, pictures))
    return page


def terminal_table(arms: Sequence[Arm], facts: ReportFacts) -> tuple[Table, list[str]]:
    """The end of a run in the terminal: a table, and the sentences that matter most.

    Raises:
        ValueError: the same arm twice.
    """
    rows = table_rows(arms, original_length=facts.original_length)
    lengths = sorted({length for row in rows for length in row.by_length})
    title = f"Right answers by length (original {facts.original_length:,}, target {facts.target_length:,})"
    table = Table(title=title, title_justify="left", caption_justify="left", min_width=len(title))
    table.add_column("arm", no_wrap=True, min_width=8)
    for length in lengths:
        table.add_column(f"{length_label(length)}{' *' if length > facts.original_length else ''}", justify="right")
    loss_length = next((row.loss_length_tokens for row in rows if row.loss_length_tokens), None)
    if loss_length:
        table.add_column(f"loss at {length_label(loss_length)}", justify="right")
    for row in rows:
        name = f"{row.arm.name}{' (recorded)' if row.arm.recorded else ''}"
        cells = [_brief(row.by_length.get(length)) for length in lengths]
        loss = [f"{row.mean_loss:.3f}" if row.mean_loss is not None else "-"] if loss_length else []
        table.add_row(escape(name), *cells, *loss)
    table.caption = f"* beyond the original length. {_INTERVALS}"
    statements = _statements(facts, arms)
    brief = [s.sentence for s in statements if s.headline or (s.topic in ("short_loss", "coverage") and not s.recorded)]
    note = retrieval_note(facts)
    return table, [*brief, note] if note else brief


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


def cells_csv(arms: Sequence[Arm]) -> str:
    """One line a cell and arm; accuracy is left to the reader, missing samples are counted and not scored as wrong."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS.split())
    for arm in arms:
        for result in grid_of(arm.samples):
            share = result.proportion
            interval = [f"{share.low:.6f}", f"{share.high:.6f}"] if share else ["", ""]
            right = share.num_successes if share else 0
            place = [result.cell.task, result.cell.length_tokens, f"{result.cell.depth:g}"]
            counts = [right, result.num_samples, result.num_missing, result.num_degenerate]
            writer.writerow([arm.name, str(arm.recorded).lower(), *place, *counts, *interval])
    return stream.getvalue()


def summary(facts: ReportFacts, arms: Sequence[Arm], statements: Sequence[Statement]) -> dict[str, Any]:
    """The page's content for programs."""
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
        }
        for row in table_rows(arms, original_length=facts.original_length)
    ]
    return {
        "facts": asdict(facts),
        "retrieval_note": retrieval_note(facts),
        "statements": [{"sentence": statement.sentence, **asdict(statement)} for statement in statements],
        "table": table,
    }


def wrong_examples(arm: Arm, count: int = NUM_EXAMPLES) -> list[SampleResult]:
    """The worst wrong answers: on the shortest prompts first, since those should be easiest, degenerate ones before."""
    wrong = [sample for sample in arm.scored if sample.score < 1.0]
    return sorted(wrong, key=lambda s: (s.length_tokens, s.degenerate is None, s.depth, s.index))[:count]


def picture_name(arm: Arm) -> str:
    """File name of an arm's own heatmap, without suffix."""
    return f"heatmap-recorded-{arm.name}" if arm.recorded else f"heatmap-{arm.name}"


def _statements(facts: ReportFacts, arms: Sequence[Arm]) -> list[Statement]:
    return draw_conclusions(
        arms,
        original_length=facts.original_length,
        target_length=facts.target_length,
        answer_tokens=facts.suite.get("max_new_tokens") or 0,
    )


def _pictures(facts: ReportFacts, arms: Sequence[Arm]) -> dict[str, Picture]:
    original, target = facts.original_length, facts.target_length
    pictures = {
        picture_name(arm): heatmap([arm], original_length=original, target_length=target, alike=arms) for arm in arms
    }
    pictures["heatmaps"] = heatmap(arms, original_length=original, target_length=target)
    pictures["loss_by_position"] = loss_by_position(arms, original_length=original, target_length=target)
    pictures["accuracy_by_length"] = accuracy_by_length(arms, original_length=original, target_length=target)
    pictures["accuracy_by_depth"] = accuracy_by_depth(arms, original_length=original)
    return pictures


def _brief(share: Proportion | None) -> str:
    if share is None:
        return "-"
    ends = "-".join(f"{end:.2f}".removeprefix("0") for end in (share.low, share.high))  # fits into 80 columns
    return f"{share.num_successes}/{share.num_trials}\n{ends}"


def _share(share: Proportion) -> dict[str, Any]:
    return {"num_right": share.num_successes, "num_samples": share.num_trials, "wilson_95": [share.low, share.high]}


def _page(
    facts: ReportFacts, arms: Sequence[Arm], statements: Sequence[Statement], pictures: Mapping[str, Picture]
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ctxext.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.filters["whole"] = _whole_intervals
    rows = table_rows(arms, original_length=facts.original_length)
    return environment.get_template("report.html.j2").render(
        facts=facts,
        origins=[list(group.values()) for group in arms_by_origin(arms)],
        recorded_mark=RECORDED_MARK,
        headlines=[s for s in statements if s.headline],
        findings=[s for s in statements if not s.headline],
        note=retrieval_note(facts),
        intervals=_INTERVALS,
        rows=rows,
        lengths=sorted({length for row in rows for length in row.by_length}),
        loss_length=next((row.loss_length_tokens for row in rows if row.loss_length_tokens), None),
        cells=[(arm, grid_of(arm.samples)) for arm in arms],
        examples=[(arm, wrong_examples(arm)) for arm in arms],
        made=_how_it_was_made(facts),
        name_of=picture_name,
        uris={name: _data_uri(picture) for name, picture in pictures.items()},
    )


def _data_uri(picture: Picture) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture.svg).decode()


def visible(text: str) -> str:
    """An answer fit for a page: shortened, and invisible or direction-changing characters written as codes."""
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text[:_ANSWER_CHARACTERS])
    return shown + ("…" if len(text) > _ANSWER_CHARACTERS else "")


def _whole_intervals(text: str) -> Markup:
    """Keep '(0.21-1.00)' on one line; the text is escaped first."""
    return Markup(re.sub(r"\([\d.]+-[\d.]+\)", r'<span class="whole">\g<0></span>', str(markupsafe.escape(text))))


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
