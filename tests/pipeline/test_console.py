"""The board of an evaluation: it fits the terminal, reads without colour, says little in a log and knows the time."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import pytest
from evaluation.known_answers import grid, oracle
from rich.console import Console

from ctxext.evaluation.store import SampleResult
from ctxext.evaluation.suite import Cell, Sample
from ctxext.pipeline import console as module
from ctxext.pipeline.console import ConsoleReporter, _Board, _Clock

DEPTHS = [round(0.1 * number, 1) for number in range(11)]
LENGTHS = [4096, 8192, 16384, 32768, 65536]
TASKS = [f"niah_multikey_{number}" for number in range(13)]


def answered(task: str, length: int, depth: float, index: int, *, seconds: float = 1.0) -> SampleResult:
    (one,) = grid(oracle, [length], depths=[depth], per_cell=1, task=task)
    return replace(one, sample_id=f"{task}/{length}/{depth:.4f}/{index}", index=index, seconds=seconds)


def asked(results: list[SampleResult]) -> list[Sample]:
    return [Sample(Cell(r.task, r.length_tokens, r.depth), r.index) for r in results]


def everything(tasks: list[str], lengths: list[int] = LENGTHS, per_cell: int = 1) -> list[SampleResult]:
    places = itertools.product(lengths, tasks, DEPTHS, range(per_cell))
    return [answered(task, length, depth, index) for length, task, depth, index in places]


def drawn(board: _Board, width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(width=width, file=stream, color_system=None).print(board.render())
    return stream.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_a_large_grid_fits_a_small_terminal() -> None:
    results = everything(TASKS)
    board = _Board("a title " * 20, asked(results), width=80, height=24)
    for result in results[:400]:
        board.add(result)
    lines = drawn(board)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "niah_multikey_12" in line)
    assert row.split() == ["niah_multikey_12", "11/11", "11/11", "...", "...", "..."]
    assert "400 of 715 samples" in lines[-1]


def test_one_task_is_shown_by_depth_and_reads_without_colour() -> None:
    results = everything(["needle"], per_cell=2)
    board = _Board("needle", asked(results), width=80, height=24)
    for result in results[:23]:
        board.add(replace(result, score=0.0) if result.depth == 0.5 else result)
    board.add(replace(results[24], status="out_of_memory", score=0.0))
    lines = drawn(board)
    assert len(lines) <= 24
    cells = {line.split()[0]: line.split()[1:] for line in lines[2:-1]}
    assert cells["0.50"] == ["0/2", "...", "...", "...", "..."]
    assert cells["0.00"][:2] == ["2/2", "1/1+"]  # one of two is still to come
    assert cells["0.10"][1] == "missing"


def test_more_lengths_than_fit_lose_those_in_the_middle() -> None:
    lengths = [1024 * number for number in range(1, 17)]
    board = _Board("needle", asked(everything(["needle"], lengths)), width=80, height=24)
    lines = drawn(board)
    assert max(map(len, lines)) <= 80
    assert "1024" in lines[1]
    assert "16384" in lines[1]
    assert "..." in lines[1]


def test_a_log_gets_a_line_for_a_finished_length_and_no_flood(clock: list[float]) -> None:
    results = everything(["needle"], per_cell=20)
    stream = io.StringIO()
    reporter = ConsoleReporter(Console(file=stream, width=80, color_system=None, force_terminal=False))
    with reporter.evaluation("needle", asked(results)) as on_sample:
        for result in results:
            clock[0] += 0.05
            on_sample(replace(result, seconds=0.05))
    lines = [line for line in stream.getvalue().splitlines() if " samples" in line]
    assert len(lines) <= 8, f"{len(results)} samples"
    finished = [line for line in lines if "tokens finished" in line]
    assert len(finished) == len(LENGTHS)
    assert "220/1100 samples, 4,096 tokens finished: 220 of 220 right; about" in finished[0]
    assert "1100/1100 samples, 65,536 tokens finished" in finished[-1]
    assert "finished in 55 s" in finished[-1]


def test_many_lengths_that_finish_together_give_one_line(clock: list[float]) -> None:
    results = everything(["needle"], [64 * number for number in range(1, 50)])
    stream = io.StringIO()
    reporter = ConsoleReporter(Console(file=stream, width=80, color_system=None, force_terminal=False))
    with reporter.evaluation("needle", asked(results)) as on_sample:
        for result in results:
            clock[0] += 0.001
            on_sample(replace(result, seconds=0.001))
    assert len([line for line in stream.getvalue().splitlines() if " samples" in line]) == 1


def test_remaining_time_is_what_each_length_has_taken(clock: list[float]) -> None:
    clocked = _Clock({f"s/{length}/{i}": length for length in (1024, 4096) for i in range(10)})
    assert clocked.remaining() == "measuring speed ..."
    for i in range(4):
        clock[0] += 3.0
        clocked.add(replace(answered("s", 1024, 0.5, i, seconds=3.0), sample_id=f"s/1024/{i}"))
    for i in range(4):
        clock[0] += 30.0
        clocked.add(replace(answered("s", 4096, 0.5, i, seconds=30.0), sample_id=f"s/4096/{i}"))
    assert clocked.remaining() == "about 3 min left"  # 6 x 3 s + 6 x 30 s
    assert clocked._estimate(8192, {4096: 30.0}) > 60.0  # longer than measured: more than in proportion


def test_samples_of_an_earlier_run_do_not_make_the_rest_look_quick(clock: list[float]) -> None:
    clocked = _Clock({f"s/{i}": 4096 for i in range(100)})
    for i in range(90):
        clocked.add(replace(answered("s", 4096, 0.5, i, seconds=60.0), sample_id=f"s/{i}"))
    assert clocked.remaining() == "measuring speed ..."
    clock[0] += 60.0
    clocked.add(replace(answered("s", 4096, 0.5, 90, seconds=60.0), sample_id="s/90"))
    assert clocked.remaining() == "about 9 min left"


def test_a_sample_told_twice_counts_once() -> None:
    results = everything(["needle"], [1024])
    board = _Board("needle", asked(results))
    for _ in range(2):
        board.add(results[0])
    assert "1 of 11 samples" in drawn(board)[-1]
