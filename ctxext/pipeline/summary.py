"""What a command prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ctxext.errors import UsageError
from ctxext.evaluation.arms import Arm
from ctxext.evaluation.cells import Over
from ctxext.evaluation.report import ReportFacts, terminal_table
from ctxext.files import format_bytes
from ctxext.model.peaks import peak_resident_bytes
from ctxext.pipeline.console import ConsoleReporter, duration
from ctxext.pipeline.evaluate import gather_evaluation, report_evaluation
from ctxext.pipeline.extend import estimated_run_seconds, output_folder, planned
from ctxext.pipeline.launch import visible_recipe
from ctxext.pipeline.report import gather, record_baseline, report_baseline, report_run
from ctxext.pipeline.run_folder import FACTS_NAME, RunFolder
from ctxext.pipeline.smoke import run_smoke
from ctxext.pipeline.stages import stages_of
from ctxext.pipeline.stored_runs import derive_results
from ctxext.planning.memory_plan import plan_memory
from ctxext.recipe.schema import Recipe
from ctxext.train.step import SummedLoss


def print_summary(console: Console, folder: Path) -> None:
    """Table of arms, conclusions, and where everything is."""
    run = RunFolder(folder)
    facts, arms = gather(run, run.recipe())
    console.print()
    _print_conclusions(console, facts, arms)
    total = sum(run.status()["stages"].values())
    peak = peak_resident_bytes()
    memory = f", peak memory {format_bytes(peak)}" if peak else ""
    console.print(f"\nTime: {duration(total)}{memory}", markup=False)
    console.print(f"Merged checkpoint: {run.merged}", markup=False, soft_wrap=True)
    console.print(f"Report: {run.report / 'index.html'}", markup=False, soft_wrap=True)


def print_smoke(reporter: ConsoleReporter, recipe: Recipe) -> None:
    """Run a smoke test and say what it shows and what not."""
    result = run_smoke(recipe, reporter)
    console = reporter.console
    console.print(f"\nSmoke test passed in {duration(result.seconds)}. It shows that", style="bold", markup=False)
    for sentence in result.shown:
        console.print(f"- {sentence}", markup=False)
    console.print("It does not show", style="bold")
    for sentence in result.not_shown:
        console.print(f"- {sentence}", markup=False)
    console.print(f"Folder, which may be removed: {result.folder}", markup=False, soft_wrap=True)


def _print_conclusions(console: Console, facts: ReportFacts, arms: Sequence[Arm]) -> None:
    table, sentences = terminal_table(arms, facts)
    console.print(table)
    for sentence in sentences:
        console.print(f"- {sentence}", markup=False)


def print_plan(reporter: ConsoleReporter, recipe: Recipe) -> None:
    """The plan, without starting anything; of a curriculum, every stage's."""
    for stage in stages_of(recipe) if recipe.stages is not None else [None]:
        own = visible_recipe(recipe if stage is None else stage.plannable)
        if stage is not None:
            reporter.info(stage.title)
        plan, parallel = planned(own)
        plan = replace(plan, memory=plan_memory(own, SummedLoss, parallel.sharding).to_json())
        reporter.plan(plan, estimated_run_seconds(own, plan), str(output_folder(own)))


def print_evaluation(console: Console, folder: Path) -> None:
    """Table of arms, conclusions and page of a folder of `ctxext eval`; nothing where another process tells them."""
    if not (folder / FACTS_NAME).is_file():
        return
    facts, arms = gather_evaluation(folder)
    _print_conclusions(console, facts, arms)
    console.print(f"Report: {folder / 'report' / 'index.html'}", markup=False, soft_wrap=True)


def rows_of(choice: str) -> Over:
    """The value of `--over`.

    Raises:
        UsageError: unknown.
    """
    if choice == "depth":
        return "depth"
    if choice == "position":
        return "position"
    raise UsageError("unknown rows", where="--over", got=choice, expected="depth or position")


def print_report(
    reporter: ConsoleReporter,
    folder: Path,
    record: Path | None,
    *,
    command: str,
    hardware: str,
    over: str = "depth",
) -> None:
    """Redraw the report of a run, a folder of `ctxext eval` or a baseline; record a run as a baseline when asked."""
    rows, run = rows_of(over), RunFolder(folder)
    is_baseline, is_evaluation = (folder / "baseline.json").is_file(), (folder / FACTS_NAME).is_file()
    if not (is_baseline or is_evaluation):
        run.recipe()  # refuses what is no run, before anything is derived
    derive_results(str(folder))
    if is_baseline:
        reporter.console.print(f"Redrawn: {report_baseline(folder)}", markup=False, soft_wrap=True)
        return
    if is_evaluation:
        if record is not None:
            raise UsageError("only a run can be recorded, not a single evaluation", where=str(folder))
        report_evaluation(folder, rows)
        print_evaluation(reporter.console, folder)
        return
    page = report_run(run, rows)
    facts, arms = gather(run, run.recipe())
    _print_conclusions(reporter.console, facts, arms)
    reporter.console.print(f"Report: {page}", markup=False, soft_wrap=True)
    if record is not None:
        reporter.console.print(
            f"Recorded: {record_baseline(run, record, command=command, hardware=hardware)}", markup=False
        )
