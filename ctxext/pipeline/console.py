"""A run on the terminal: the plan, a live table of cells, a training line with remaining time.

Remaining time is estimated from what this run has measured so far, weighted by the cost of what is left: a 12K prompt
costs far more than six 2K ones. Without a terminal (a log file, CI) everything becomes plain lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ctxext.evaluation.store import SampleResult
from ctxext.evaluation.suite import Cell, Sample
from ctxext.files import format_bytes
from ctxext.pipeline.run_folder import recipe_yaml
from ctxext.planning.plan import Plan
from ctxext.recipe.schema import Recipe
from ctxext.train.loop import StepMetrics, TrainHooks, TrainStart

_PLAIN_EVERY_SECONDS = 20.0


def duration(seconds: float) -> str:
    """'45 s', '12 min', '1 h 20 min', '3 days'."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    if minutes > 48 * 60:
        return f"{round(minutes / 1440)} days"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class ConsoleReporter:
    """Draws a run with rich."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._started = time.perf_counter()

    def recipe(self, recipe: Recipe) -> None:
        """Print a recipe with every default written out."""
        self.console.print(Syntax(recipe_yaml(recipe).rstrip(), "yaml", background_color="default"))

    def plan(self, plan: Plan, estimated_seconds: float, output_dir: str) -> None:
        """Print the plan as a table."""
        table = Table(title="Plan", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for key, value in plan_rows(plan, estimated_seconds, output_dir):
            table.add_row(Text(key, style="bold"), Text(value))
        self.console.print(table)

    def stage(self, number: int, count: int, title: str) -> None:
        """Announce a stage."""
        elapsed = duration(time.perf_counter() - self._started)
        self.console.print(
            Text(f"\n[{number}/{count}] {title}", style="bold cyan"), Text(f"({elapsed} so far)", style="dim")
        )

    def info(self, text: str) -> None:
        """One line."""
        self.console.print(Text(f"  {text}", style="dim"), soft_wrap=True)

    @contextmanager
    def evaluation(self, title: str, samples: list[Sample]) -> Iterator[Callable[[SampleResult], None]]:
        """A table of cells that fills as samples finish."""
        board = _Board(title, samples)
        if not self.console.is_terminal:

            def plain(result: SampleResult) -> None:
                board.add(result)
                self.console.print(board.line(result))

            yield plain
            self.console.print(board.heading(), board.table())
            return
        with Live(board.render(), console=self.console, refresh_per_second=2, get_renderable=board.render) as live:

            def drawn(result: SampleResult) -> None:
                board.add(result)
                live.refresh()

            yield drawn

    @contextmanager
    def training(self, title: str, steps: int) -> Iterator[TrainHooks]:
        """A progress line with loss, gradient norm, speed and remaining time."""
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(title, total=steps, numbers="")
            line = _TrainLine(self, progress, task)
            yield TrainHooks(on_start=line.start, on_step=line.step)

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for a preparation."""
        with Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        ) as progress:
            task = progress.add_task(title, total=None)

            def update(done: int, total: int) -> None:
                progress.update(task, completed=min(done, total), total=total)

            yield update


class _TrainLine:
    def __init__(self, reporter: ConsoleReporter, progress: Progress, task: object) -> None:
        self._reporter = reporter
        self._progress = progress
        self._task = task
        self._spent: list[float] = []
        self._last_plain = 0.0

    def start(self, start: TrainStart) -> None:
        share = 100 * start.num_trainable / start.num_parameters
        for message in (
            f"{start.num_trainable:,} of {start.num_parameters:,} parameters train ({share:.1f}%)",
            f"after preparation, {start.verification.summary()}",
            f"attention kernel: {', '.join(start.kernels) or 'none found'}",
            *start.messages,
        ):
            self._reporter.info(message)
        self._progress.update(self._task, completed=start.resumed_step)  # type: ignore[arg-type]

    def step(self, metrics: StepMetrics) -> None:
        self._spent.append(metrics.seconds)
        recent = self._spent[-20:]
        remaining = duration((metrics.steps - metrics.step) * sum(recent) / len(recent))
        numbers = (
            f"loss {metrics.loss:.3f}  grad {metrics.grad_norm:.2f}  {metrics.tokens_per_second:.0f} tokens/s  "
            f"{remaining} left"
        )
        self._progress.update(self._task, completed=metrics.step, numbers=numbers)  # type: ignore[arg-type]
        if not self._reporter.console.is_terminal:
            now = time.perf_counter()
            if now - self._last_plain > _PLAIN_EVERY_SECONDS or metrics.step == metrics.steps:
                self._last_plain = now
                self._reporter.info(f"step {metrics.step}/{metrics.steps}  {numbers}")


class _Board:
    """Counts of one evaluation."""

    def __init__(self, title: str, samples: list[Sample]) -> None:
        self._title = title
        self._wanted: dict[Cell, int] = {}
        for sample in samples:
            self._wanted[sample.cell] = self._wanted.get(sample.cell, 0) + 1
        self._results: dict[str, SampleResult] = {}
        self._total = len(samples)
        self._left = {sample.sample_id: sample.cell.length_tokens for sample in samples}
        self._started = time.perf_counter()
        self._work_done = 0.0
        self._fresh = 0

    @staticmethod
    def _work(length: int) -> float:
        # Seconds grow a little faster than the length; exact weights matter less than counting long prompts as long.
        return length * (1.0 + length / 8192)

    def add(self, result: SampleResult) -> None:
        self._results[result.sample_id] = result
        length = self._left.pop(result.sample_id, 0)
        waited = time.perf_counter() - self._started
        # Samples of an earlier try arrive at once; they say nothing about speed.
        if result.seconds <= waited + 0.5:
            self._work_done += self._work(length)
            self._fresh += 1

    def remaining(self) -> str:
        if not self._left:
            return f"finished in {duration(time.perf_counter() - self._started)}"
        if not self._work_done:
            return "measuring speed ..."
        rate = (time.perf_counter() - self._started) / self._work_done
        return f"about {duration(sum(self._work(length) for length in self._left.values()) * rate)} left"

    def line(self, result: SampleResult) -> str:
        outcome = "right" if result.score >= 1 else "wrong" if result.status == "ok" else result.status
        return (
            f"  {len(self._results)}/{self._total}  {result.length_tokens} tokens, depth {result.depth:g}: {outcome} "
            f"({result.seconds:.1f} s; {self.remaining()})"
        )

    def render(self) -> Group:
        left = Text(f"  {len(self._results)} of {self._total} samples, {self.remaining()}", style="dim")
        return Group(self.heading(), self.table(), left)

    def heading(self) -> Text:
        return Text(f"  {self._title}", style="italic", overflow="ellipsis", no_wrap=True)

    def table(self) -> Table:
        lengths = sorted({cell.length_tokens for cell in self._wanted})
        rows = sorted({(cell.task, cell.depth) for cell in self._wanted})
        several = len({task for task, _ in rows}) > 1
        table = Table(box=None, padding=(0, 1))
        if several:
            table.add_column("task")
        table.add_column("depth")
        for length in lengths:
            table.add_column(f"{length}", justify="right")
        for task, depth in rows:
            name = [task] if several else []
            table.add_row(*name, f"{depth:.2f}", *(self._cell(Cell(task, length, depth)) for length in lengths))
        return table

    def _cell(self, cell: Cell) -> Text:
        members = [
            r
            for r in self._results.values()
            if (r.task, r.length_tokens, r.depth) == (cell.task, cell.length_tokens, cell.depth)
        ]
        wanted = self._wanted.get(cell, 0)
        if not wanted:
            return Text("")
        if not members:
            return Text("...", style="dim")
        scored = [r for r in members if r.status == "ok"]
        if not scored:
            return Text("missing", style="yellow")
        right = sum(r.score >= 1 for r in scored)
        style = "green" if right == len(scored) else "red" if right == 0 else "yellow"
        return Text(f"{right}/{len(scored)}", style=style)


def plan_rows(plan: Plan, estimated_seconds: float, output_dir: str) -> list[tuple[str, str]]:
    """The plan as (name, text) for people."""
    steps_tokens = f"{plan.train_tokens:,} tokens: {plan.steps} steps x {plan.windows_per_step} x {plan.window_tokens}"
    facts = (
        f"; {plan.facts_share:.0%} of the windows carry synthetic facts (retrieval training)"
        if plan.facts_share
        else ""
    )
    suite = plan.suite
    return [
        *(("note", note) for note in plan.notes),
        ("model", f"{plan.model} ({plan.model_type}, {plan.num_parameters:,} parameters)"),
        ("positions", f"{plan.original_length} -> {plan.target_length} (factor {plan.factor:g})"),
        (
            "RoPE",
            f"{plan.method}, attention factor {plan.attention_factor:.4f}; {plan.positions}",
        ),
        ("training", f"{steps_tokens}, {plan.window_mode} windows{facts}"),
        (
            "adapter",
            f"LoRA, {plan.num_trainable:,} parameters; with gradients and moments {format_bytes(plan.trainable_bytes)}",
        ),
        (
            "evaluation",
            f"suite {suite['name']}: {plan.num_samples} samples, {plan.prefill_tokens:,} prompt tokens an arm, "
            f"longest {plan.longest_prompt} (KV cache {format_bytes(plan.cache_bytes)})",
        ),
        ("arms", ", ".join(plan.arms)),
        ("time", f"about {duration(estimated_seconds)} at the matrix speed measured here"),
        ("disk", f"{format_bytes(2 * plan.merged_bytes)} at most in {output_dir}"),
        ("plan id", plan.plan_id),
    ]
