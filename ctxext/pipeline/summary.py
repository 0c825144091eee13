"""What a command prints at its end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ctxext.errors import UsageError
from ctxext.evaluation.report import terminal_table
from ctxext.files import format_bytes
from ctxext.pipeline.console import ConsoleReporter, duration
from ctxext.pipeline.evaluate import FACTS_NAME, gather_evaluation, report_evaluation
from ctxext.pipeline.extend import estimated_run_seconds, output_folder
from ctxext.pipeline.report import gather, record_baseline, report_run
from ctxext.pipeline.run_folder import RunFolder, peak_memory_bytes
from ctxext.planning.plan import make_plan
from ctxext.recipe.schema import Recipe


def print_summary(console: Console, folder: Path) -> None:
    """Table of arms, conclusions, and where everything is."""
    run = RunFolder(folder)
    facts, arms = gather(run, run.recipe())
    table, sentences = terminal_table(arms, facts)
    console.print()
    console.print(table)
    for sentence in sentences:
        console.print(f"- {sentence}", markup=False)
    total = sum(run.status()["stages"].values())
    peak = peak_memory_bytes()
    memory = f", peak memory {format_bytes(peak)}" if peak else ""
    console.print(f"\nTime: {duration(total)}{memory}", markup=False)
    console.print(f"Merged checkpoint: {run.merged}", markup=False, soft_wrap=True)
    console.print(f"Report: {run.report / 'index.html'}", markup=False, soft_wrap=True)


def print_plan(reporter: ConsoleReporter, recipe: Recipe) -> None:
    """The plan, without starting anything."""
    plan = make_plan(recipe)
    reporter.plan(plan, estimated_run_seconds(recipe, plan), str(output_folder(recipe)))


def print_report(reporter: ConsoleReporter, folder: Path, record: Path | None, *, command: str, hardware: str) -> None:
    """Redraw the report of a run or of a folder of `ctxext eval`, and record a run as a baseline when asked."""
    run = RunFolder(folder)
    if (folder / FACTS_NAME).is_file():
        if record is not None:
            raise UsageError("only a run can be recorded, not a single evaluation", where=str(folder))
        facts, arms = gather_evaluation(folder)
        page = report_evaluation(folder, reporter)
        if len({sample.task for sample in arms[0].samples}) > 1:
            reporter.console.print(f"Reports: {page}", markup=False, soft_wrap=True)
            return
    else:
        page = report_run(run)
        facts, arms = gather(run, run.recipe())
    table, sentences = terminal_table(arms, facts)
    reporter.console.print(table)
    for sentence in sentences:
        reporter.console.print(f"- {sentence}", markup=False)
    reporter.console.print(f"Report: {page}", markup=False, soft_wrap=True)
    if record is not None:
        reporter.console.print(
            f"Recorded: {record_baseline(run, record, command=command, hardware=hardware)}", markup=False
        )
