"""A run on the terminal: the plan, a live table of cells, a training line with remaining time.

Remaining time is estimated from what this run has measured so far, length by length: a 12K prompt costs far more than
six 2K ones. Without a terminal (a log file, CI) everything becomes plain lines, few of them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ctxext.evaluation.store import SampleResult
from ctxext.evaluation.suite import Cell, Sample
from ctxext.files import format_bytes
from ctxext.model.adaptation import TrainedPart
from ctxext.pipeline.run_folder import recipe_yaml
from ctxext.planning.memory_plan import memory_rows
from ctxext.planning.parallel_plan import ParallelPlan
from ctxext.planning.plan import Plan
from ctxext.recipe.schema import Recipe
from ctxext.train.loop import TrainHooks, TrainStart
from ctxext.train.metrics import StepMetrics

_PLAIN_EVERY_SECONDS = 20.0
_PLAIN_LENGTH_SECONDS = 3.0
_BOARD_FRAME_LINES = 6  # heading, column names, remaining time, and the lines of the terminal above
_TASK_WIDTH = 18
_COLUMN_WIDTH = 9
_RECENT = 20
_PARALLEL = 1.05


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
        board = _Board(title, samples, *self.console.size)
        if not self.console.is_terminal:
            yield _PlainLines(self.console, board).add
            self.console.print(board.heading(), board.table())
            return
        # Drawn twice a second, not with every sample: short prompts come by the hundred.
        with Live(console=self.console, refresh_per_second=2, get_renderable=board.render):
            yield board.add

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
            yield TrainHooks(on_start=line.start, on_step=line.step, on_note=self.info)

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for a preparation."""
        with Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
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
            f"{start.num_trainable:,} of {start.num_parameters:,} parameters train ({share:.1f}%): "
            + ", ".join(part.describe() for part in start.trained),
            f"after preparation, {start.verification.summary()}",
            f"attention kernel: {', '.join(start.kernels) or 'none: plain matrix products'}",
            *start.messages,
            *(start.probe.lines() if start.probe else ()),
            *self._expected(start),
        ):
            self._reporter.info(message)
        self._progress.update(self._task, completed=start.resumed_step)  # type: ignore[arg-type]

    @staticmethod
    def _expected(start: TrainStart) -> Iterator[str]:
        if start.probe is not None:
            seconds = (start.steps - start.resumed_step) * start.probe.step_seconds
            yield f"about {duration(seconds)} of training ahead"

    def step(self, metrics: StepMetrics) -> None:
        self._spent.append(metrics.seconds)
        recent = self._spent[-20:]
        remaining = duration((metrics.steps - metrics.step) * sum(recent) / len(recent))
        measured = "skipped" if metrics.skipped else f"loss {metrics.loss:.3f}  grad {metrics.grad_norm:.2f}"
        numbers = f"{measured}  {metrics.tokens_per_second:.0f} tokens/s  {remaining} left"
        self._progress.update(self._task, completed=metrics.step, numbers=numbers)  # type: ignore[arg-type]
        if not self._reporter.console.is_terminal:
            now = time.perf_counter()
            if now - self._last_plain > _PLAIN_EVERY_SECONDS or metrics.step == metrics.steps:
                self._last_plain = now
                self._reporter.info(f"step {metrics.step}/{metrics.steps}  {numbers}")


class _Board:
    """Counts of one evaluation, in a table that fits the terminal however large the grid is.

    Counts are kept as results come, because a large grid is drawn often. A grid with more rows than fit is shown by
    task, all depths together; more lengths than fit lose those in the middle.
    """

    def __init__(self, title: str, samples: list[Sample], width: int = 80, height: int = 24) -> None:
        self._title = title
        self._tallies: dict[Cell, _Tally] = {}
        for sample in samples:
            self._tallies.setdefault(sample.cell, _Tally()).wanted += 1
        self._seen: set[str] = set()
        self._total = len(samples)
        self._width, self._height = width, height
        self._clock = _Clock({sample.sample_id: sample.cell.length_tokens for sample in samples})

    def add(self, result: SampleResult) -> None:
        """Count one result; a sample that is told twice counts once."""
        if result.sample_id in self._seen:
            return
        self._seen.add(result.sample_id)
        self._clock.add(result)
        tally = self._tallies.setdefault(Cell(result.task, result.length_tokens, result.depth), _Tally())
        tally.add(result)

    @property
    def is_complete(self) -> bool:
        """Whether every sample has a result."""
        return len(self._seen) >= self._total

    def finished_length(self, length: int) -> bool:
        """Whether every sample of a length has a result."""
        return all(t.done >= t.wanted for cell, t in self._tallies.items() if cell.length_tokens == length)

    def line(self, length: int | None = None) -> str:
        """Where the evaluation stands, and how a finished length came out."""
        state = f"  {len(self._seen)}/{self._total} samples"
        if length is not None:
            tally = _Tally.sum(t for cell, t in self._tallies.items() if cell.length_tokens == length)
            state += f", {length:,} tokens finished: {tally.facts()}"
        return f"{state}; {self._clock.remaining()}"

    def render(self) -> Group:
        """Everything, for a terminal."""
        left = Text(f"  {len(self._seen)} of {self._total} samples, {self._clock.remaining()}", style="dim")
        return Group(self.heading(), self.table(), left)

    def heading(self) -> Text:
        """What is evaluated."""
        return Text(f"  {self._title}", style="italic", overflow="ellipsis", no_wrap=True)

    def table(self) -> Table:
        """Right answers by depth or task, and length."""
        lengths = self._lengths()
        tasks = list(dict.fromkeys(cell.task for cell in self._tallies))
        rows = sorted({(cell.task, cell.depth) for cell in self._tallies})
        by_depth = len(rows) + _BOARD_FRAME_LINES <= self._height
        table = Table(box=None, padding=(0, 1))
        if len(tasks) > 1 or not by_depth:
            table.add_column("task", no_wrap=True, max_width=_TASK_WIDTH)
        if by_depth:
            table.add_column("depth")
        for length in lengths:
            table.add_column("..." if length is None else f"{length}", justify="right", no_wrap=True)
        last = None
        for task, depth in rows if by_depth else [(task, None) for task in tasks]:
            name = [Text("" if task == last else task)] if len(tasks) > 1 or not by_depth else []
            place = [Text(f"{depth:.2f}")] if depth is not None else []
            table.add_row(*name, *place, *(self._cell(task, length, depth) for length in lengths))
            last = task
        return table

    def _lengths(self) -> list[int | None]:
        """Lengths that fit beside each other; None stands for those left out."""
        lengths: list[int | None] = [*sorted({cell.length_tokens for cell in self._tallies})]
        room = max(3, (self._width - _TASK_WIDTH - 8) // _COLUMN_WIDTH)
        if len(lengths) <= room:
            return lengths
        return [lengths[0], None, *lengths[2 - room :]]

    def _cell(self, task: str, length: int | None, depth: float | None) -> Text:
        if length is None:
            return Text("")
        if depth is not None:
            tally = self._tallies.get(Cell(task, length, depth), _Tally())
        else:
            tally = _Tally.sum(
                t for cell, t in self._tallies.items() if (cell.task, cell.length_tokens) == (task, length)
            )
        return tally.text()


@dataclass
class _Tally:
    """Samples of a cell, or of several."""

    wanted: int = 0
    done: int = 0
    scored: int = 0
    right: int = 0

    @staticmethod
    def sum(tallies: Iterable[_Tally]) -> _Tally:
        """All together."""
        whole = _Tally()
        for tally in tallies:
            for name in ("wanted", "done", "scored", "right"):
                setattr(whole, name, getattr(whole, name) + getattr(tally, name))
        return whole

    def add(self, result: SampleResult) -> None:
        """Count a result."""
        self.done += 1
        self.scored += result.status == "ok"
        self.right += result.status == "ok" and result.score >= 1

    def facts(self) -> str:
        """'12 of 16 right, 2 missing'."""
        missing = self.done - self.scored
        return f"{self.right} of {self.scored} right{f', {missing} missing' if missing else ''}"

    def text(self) -> Text:
        """A cell of the board; readable without colour."""
        if not self.wanted and not self.done:
            return Text("")
        if not self.done:
            return Text("...", style="dim")
        if not self.scored:
            return Text("missing", style="yellow")
        style = "green" if self.right == self.scored else "red" if self.right == 0 else "yellow"
        open_mark = "+" if self.done < self.wanted else ""  # more to come
        return Text(f"{self.right}/{self.scored}{open_mark}", style=style)


class _Clock:
    """Remaining time from the prompts of this run: the seconds of each length, as they are measured.

    Lengths without a measurement yet are estimated from the nearest one that has. Work that the samples do not report
    (building prompts, storing) and processes that share the work are covered by the ratio of the time that has passed
    to the sum of the samples' own. Samples of an earlier run arrive without any time passing and count for nothing.
    """

    def __init__(self, lengths: dict[str, int]) -> None:
        self._left = dict(lengths)
        self._seconds: dict[int, list[float]] = {}
        self._measured = 0.0
        self._reused = 0
        self._started = time.perf_counter()

    @property
    def _passed(self) -> float:
        return time.perf_counter() - self._started

    def add(self, result: SampleResult) -> None:
        """Note a finished sample."""
        self._left.pop(result.sample_id, None)
        if self._measured + result.seconds > _PARALLEL * self._passed + 0.5:
            self._reused += 1
            return
        self._measured += result.seconds
        if result.status == "ok" or result.seconds:
            self._seconds.setdefault(result.length_tokens, []).append(result.seconds)

    def remaining(self) -> str:
        """'about 12 min left'; before anything is measured that it will be."""
        if not self._left:
            return f"finished in {duration(self._passed)}"
        if not self._measured:
            return "measuring speed ..."
        # Copied first: the terminal is drawn by a thread while results come in.
        recent = [(length, seconds[-_RECENT:]) for length, seconds in list(self._seconds.items())]
        means = {length: math.fsum(seconds) / len(seconds) for length, seconds in recent}
        counts = Counter(list(self._left.values()))
        seconds = math.fsum(count * self._estimate(length, means) for length, count in counts.items())
        return f"about {duration(seconds * self._passed / self._measured)} left"

    @staticmethod
    def _estimate(length: int, means: dict[int, float]) -> float:
        if length in means:
            return means[length]
        nearest = min(means, key=lambda other: abs(math.log(other / length)))
        return means[nearest] * _work(length) / _work(nearest)


def _work(length: int) -> float:
    # Seconds grow a little faster than the length; only lengths that nothing was measured of rest on this.
    return length * (1.0 + length / 8192)


class _PlainLines:
    """An evaluation in a log file: a line for every finished length, and one now and then in between."""

    def __init__(self, console: Console, board: _Board) -> None:
        self._console = console
        self._board = board
        self._last = time.perf_counter()
        self._told: set[int] = set()
        self._due: int | None = None

    def add(self, result: SampleResult) -> None:
        """Count a result, and say where things stand when there is something to say."""
        self._board.add(result)
        length, now = result.length_tokens, time.perf_counter()
        if length not in self._told and self._board.finished_length(length):
            self._told.add(length)
            self._due = length
        soon = self._due is not None and now - self._last >= _PLAIN_LENGTH_SECONDS
        if soon or now - self._last >= _PLAIN_EVERY_SECONDS or self._board.is_complete:
            self._console.print(self._board.line(self._due), markup=False, soft_wrap=True)
            self._last, self._due = now, None


def trained_rows(plan: Plan) -> list[tuple[str, str]]:
    """What trains, by kind, with its share of the model and its bytes."""
    share = f"{100 * plan.num_trainable / plan.num_parameters:.3g}%"
    parts = [TrainedPart(**part) for part in plan.trained]
    return [
        (
            "trained",
            f"{plan.adaptation}: {plan.num_trainable:,} parameters ({share} of the model's number); with gradients and "
            f"moments {format_bytes(plan.trainable_bytes)}",
        ),
        *(
            ("", f"{part.describe()} ({part.num_parameters / plan.num_trainable:.1%}), {format_bytes(part.num_bytes)}")
            for part in parts
        ),
    ]


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
        *(("data", line) for line in plan.data),
        *trained_rows(plan),
        ("attention", plan.attention),
        *((("processes", ParallelPlan(**plan.parallel).describe()),) if plan.parallel else ()),
        *(memory_rows(plan.memory) if plan.memory else ()),
        (
            "evaluation",
            f"suite {suite['name']}: {plan.num_samples} samples, {plan.prefill_tokens:,} prompt tokens an arm, "
            f"longest {plan.longest_prompt} (KV cache {format_bytes(plan.cache_bytes)})",
        ),
        ("arms", ", ".join(plan.arms)),
        ("time", f"about {duration(estimated_seconds)} at the matrix speed measured here"),
        ("disk", f"{format_bytes(plan.disk_bytes)} at most in {output_dir}"),
        ("plan id", plan.plan_id),
    ]
