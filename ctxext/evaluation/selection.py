"""Which of a suite's samples are asked: other lengths and depths, and fewer of them but never without the longest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

from ctxext.errors import UsageError
from ctxext.evaluation.grid import RelativeLength
from ctxext.evaluation.suite import Sample, Suite
from ctxext.evaluation.tasks.registry import AnyTask

Length = int | RelativeLength
T = TypeVar("T")


def parse_lengths(text: str) -> list[Length]:
    """Lengths from `2048,16K,50%`: tokens, multiples of 1,024, or shares of the target length.

    Raises:
        UsageError: anything else.
    """
    return [_length(part.strip()) for part in text.split(",")]


def _length(text: str) -> Length:
    number, scale = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if text.endswith("%"):
        share = _number(text[:-1])
        if share is not None and 0 < share <= 100:
            return RelativeLength(target=share / 100)
    elif number.isascii() and number.isdigit() and int(number) * scale >= 32:
        return int(number) * scale
    raise UsageError(
        "not a length", where="--lengths", got=text or "nothing", expected="tokens from 32 on (2048, 16K), or 50%"
    )


def parse_depths(text: str) -> list[float]:
    """Depths from `0,0.5,1`, or from a whole number above 1: so many, evenly spread over 0 to 1.

    Raises:
        UsageError: anything else, or a depth twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 and parts[0].isascii() and parts[0].isdigit() and 1 < int(parts[0]) <= 1000:
        count = int(parts[0])
        return [round(place / (count - 1), 4) for place in range(count)]
    depths = [_number(part) for part in parts]
    found = [depth for depth in depths if depth is not None and 0 <= depth <= 1]
    if len(found) < len(parts) or len(set(found)) < len(found):
        raise UsageError(
            "not depths", where="--depths", got=text, expected="different numbers from 0 to 1 (0,0.5,1), or how many"
        )
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def with_grid(
    suite: Suite,
    lengths: Sequence[Length] | None = None,
    depths: Sequence[float] | None = None,
    num_samples: int | None = None,
) -> Suite:
    """The suite with other lengths, depths or samples a cell.

    A task with a grid of its own (a control, as a rule) keeps its depths and samples and gets the first and the last of
    the lengths.

    Raises:
        UsageError: fewer than one sample.
    """
    if num_samples is not None and num_samples < 1:
        raise UsageError("no samples to ask", where="--samples", got=num_samples, expected="1 or more")
    if lengths is None and depths is None and num_samples is None:
        return suite
    rows = suite.grid
    if lengths is not None:
        rows = [rows[0].model_copy(update={"length": length}) for length in lengths]
    update: dict[str, object] = {} if depths is None else {"depths": list(depths)}
    update |= {} if num_samples is None else {"samples": num_samples}
    changes: dict[str, object] = {"grid": [row.model_copy(update=update) for row in rows]}
    if suite.tasks is not None and lengths is not None:
        ends = list(dict.fromkeys([lengths[0], lengths[-1]]))
        changes["tasks"] = [_at(task, ends) for task in suite.tasks]
    return suite.model_copy(update=changes)


def _at(task: AnyTask, lengths: Sequence[Length]) -> AnyTask:
    if task.grid is None:
        return task
    return task.model_copy(update={"grid": [task.grid[0].model_copy(update={"length": n}) for n in lengths]})


def limited(samples: Sequence[Sample], per_task: int) -> list[Sample]:
    """At most `per_task` samples of every task, spread over the grid and the longest length among them.

    Raises:
        UsageError: fewer than one.
    """
    if per_task < 1:
        raise UsageError("no samples to ask", where="--limit", got=per_task, expected="1 or more a task")
    kept: set[Sample] = set()
    for task in {sample.cell.task for sample in samples}:
        kept.update(by_importance([sample for sample in samples if sample.cell.task == task])[:per_task])
    return [sample for sample in samples if sample in kept]


def affordable(samples: Sequence[Sample], seconds_of: Callable[[Sample], float], budget_seconds: float) -> list[Sample]:
    """Samples whose time together stays within the budget: every task's longest length first, then what covers most.

    Raises:
        UsageError: one sample of the longest length of every task takes longer already.
    """
    ranked: list[tuple[int, int, Sample]] = []
    for number, task in enumerate(dict.fromkeys(sample.cell.task for sample in samples)):
        own = by_importance([sample for sample in samples if sample.cell.task == task])
        ranked += [(rank, number, sample) for rank, sample in enumerate(own)]
    ranked.sort(key=lambda entry: entry[:2])
    needed = sum(seconds_of(sample) for rank, _, sample in ranked if rank == 0)
    if needed > budget_seconds:
        raise UsageError(
            "the longest length does not fit into the given time, and ctxext never drops it",
            where="--max-minutes",
            got=f"{budget_seconds / 60:g}",
            expected=f"at least {needed / 60:.1f} for one sample of the longest length of every task",
        )
    kept: set[Sample] = set()
    spent = 0.0
    for _, _, sample in ranked:
        spent += seconds_of(sample)
        if spent > budget_seconds:
            break
        kept.add(sample)
    return [sample for sample in samples if sample in kept]


def by_importance(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of one task in an order whose every beginning covers the grid well, the longest length first.

    First samples of every cell come before second ones; among them all lengths of the middle depth, then the outer
    depths, then what lies between.
    """
    lengths = _spread(sorted({sample.cell.length_tokens for sample in samples}, reverse=True))
    depths = {
        length: _spread_from_middle(sorted({s.cell.depth for s in samples if s.cell.length_tokens == length}))
        for length in lengths
    }
    return sorted(
        samples,
        key=lambda sample: (
            sample.index,
            depths[sample.cell.length_tokens].index(sample.cell.depth),
            lengths.index(sample.cell.length_tokens),
        ),
    )


def _spread(ordered: Sequence[T]) -> list[T]:
    """First, last, then the middles of what lies between, breadth first."""
    if len(ordered) <= 2:
        return list(ordered)
    found, waiting = [0, len(ordered) - 1], [(0, len(ordered) - 1)]
    while waiting:
        low, high = waiting.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            found.append(middle)
            waiting += [(low, middle), (middle, high)]
    return [ordered[place] for place in found]


def _spread_from_middle(depths: Sequence[float]) -> list[float]:
    middle = len(depths) // 2
    return list(dict.fromkeys([depths[middle], *_spread(depths)]))


def describe_samples(samples: Sequence[Sample]) -> str:
    """'24 samples of 2 tasks at 2,048 (8) and 16,368 (16) tokens, 278,272 prompt tokens'."""
    lengths = sorted(sample.cell.length_tokens for sample in samples)
    places = [f"{length:,} ({len(list(group))})" for length, group in groupby(lengths)]
    listed = places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
    num_tasks = len({sample.cell.task for sample in samples})
    tasks = f" of {num_tasks} tasks" if num_tasks > 1 else ""
    noun = "sample" if len(samples) == 1 else "samples"
    return f"{len(samples):,} {noun}{tasks} at {listed} tokens, {sum(lengths):,} prompt tokens"
