"""`results.json` under the keys of EleutherAI's lm-evaluation-harness, and the cells as CSV.

Programs that read the harness's files find results, configs, versions, n-shot and n-samples where they expect them; a
length is a metric of its task, as in the harness's RULER. What the harness has no place for (cells, intervals,
clusters, effective length, tail) stands beside it under its own names.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ctxext.evaluation.arms import Arm, Coverage
from ctxext.evaluation.effective_length import needle_effective_lengths
from ctxext.evaluation.statistics import MeanScore
from ctxext.evaluation.store import SampleResult, score_of
from ctxext.evaluation.suite import Cell
from ctxext.evaluation.tail import TailNumber, tail_number

_DIGITS = 6
_CSV_COLUMNS = (
    "arm recorded task length_tokens depth num_samples num_missing num_degenerate num_empty num_repeating num_endless "
    "num_right score low high num_haystacks num_effective"
)
_DEGENERATE = ("empty", "repeating", "endless")


def results_table(
    samples: Sequence[SampleResult], *, run: Mapping[str, Any], suite: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that `results.json` holds, derived from samples and the `run.json` beside them."""
    tasks = {task: [s for s in samples if s.task == task] for task in sorted({s.task for s in samples})}
    identity, environment = dict(run.get("identity", {})), dict(run.get("environment", {}))
    weights = identity.get("weights", {})
    return {
        "results": {task: _task_results(task, members) for task, members in tasks.items()},
        "group_subtasks": {task: [] for task in tasks},
        "configs": {task: _task_config(task, members, identity) for task, members in tasks.items()},
        "versions": {task: _version(members) for task, members in tasks.items()},
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {task: {"score": True, "accuracy": True} for task in tasks},
        "n-samples": {
            task: {"original": len(members), "effective": sum(s.status == "ok" for s in members)}
            for task, members in tasks.items()
        },
        "config": {
            "model": "ctxext",
            "model_args": weights,
            "dtype": identity.get("dtype"),
            "device": environment.get("device"),
            "random_seed": identity.get("seed"),
            "gen_kwargs": {"do_sample": False, "max_gen_toks": _longest_budget(tasks, identity)},
        },
        "model_source": "ctxext",
        "model_name": weights.get("source"),
        "transformers_version": environment.get("packages", {}).get("transformers"),
        "total_evaluation_time_seconds": round(math.fsum(sample.seconds for sample in samples), 1),
        "environment": environment,
        "suite": dict(suite or {}),
        "cells": [_cell_numbers(cell, members) for cell, members in cells_of(samples)],
        "effective_length": {task: _effective(members) for task, members in tasks.items()},
        "tail": {task: _tail(members) for task, members in tasks.items()},
    }


def cells_of(samples: Iterable[SampleResult]) -> list[tuple[Cell, list[SampleResult]]]:
    """Samples by cell, in the order of task, length and depth."""
    groups: dict[Cell, list[SampleResult]] = {}
    for sample in samples:
        groups.setdefault(sample.cell, []).append(sample)
    return sorted(groups.items(), key=lambda group: group[0])


def cells_table(arms: Sequence[Arm], coverage: Coverage | None = None) -> str:
    """CSV with one line a cell and arm: counts, mean score with its interval, haystacks behind it.

    Args:
        coverage: how far the suite reached, to stand in every line: nothing is claimed beyond it.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    limits = {"longest_tested": coverage.longest_tokens, "target_length": coverage.target_length} if coverage else {}
    writer.writerow([*_CSV_COLUMNS.split(), *limits])
    for arm in arms:
        for cell, members in cells_of(arm.samples):
            numbers = _cell_numbers(cell, members)
            interval = numbers.get("interval_95", ["", ""])
            writer.writerow(
                [
                    arm.name,
                    str(arm.recorded).lower(),
                    cell.task,
                    cell.length_tokens,
                    f"{cell.depth:g}",
                    *(numbers[key] for key in ("num_samples", "num_missing", "num_degenerate")),
                    *(numbers["degenerate"].get(kind, 0) for kind in _DEGENERATE),
                    numbers["num_right"],
                    numbers.get("score", ""),
                    *interval,
                    numbers.get("num_haystacks", ""),
                    numbers.get("num_effective", ""),
                    *limits.values(),
                ]
            )
    return stream.getvalue()


def _task_results(task: str, members: Sequence[SampleResult]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"alias": task}
    right = [1.0 if s.score >= 1.0 else 0.0 for s in members if s.status == "ok"]
    whole = score_of(members)
    if whole is None:
        return numbers
    numbers["accuracy,none"] = round(math.fsum(right) / len(right), _DIGITS)
    numbers |= _metric("score", whole)
    for length in sorted({sample.length_tokens for sample in members}):
        score = score_of(sample for sample in members if sample.length_tokens == length)
        if score is not None:
            numbers |= _metric(str(length), score)
    return numbers


def _metric(name: str, score: MeanScore) -> dict[str, Any]:
    """A value, its standard error with the effective number of samples, its interval and what it rests on."""
    error = math.sqrt(score.value * (1 - score.value) / score.num_effective)
    return {
        f"{name},none": round(score.value, _DIGITS),
        f"{name}_stderr,none": round(error, _DIGITS),
        f"{name}_interval_95,none": [round(score.low, _DIGITS), round(score.high, _DIGITS)],
        f"{name}_haystacks,none": score.num_clusters,
    }


def _task_config(task: str, members: Sequence[SampleResult], identity: Mapping[str, Any]) -> dict[str, Any]:
    shared = {key: value for key, value in identity.items() if key not in ("weights", "tasks")}
    return {
        "task": task,
        "output_type": "generate_until",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in _metrics(members)
        ],
        "generation_kwargs": {"do_sample": False, "max_gen_toks": _budget(task, identity)},
        "num_fewshot": 0,
        "metadata": {**shared, **identity.get("tasks", {}).get(task, {})},
    }


def _budget(task: str, identity: Mapping[str, Any]) -> int | None:
    """Answer tokens of a task: its own where the suite has several, else the suite's."""
    own: int | None = identity.get("tasks", {}).get(task, identity).get("max_new_tokens")
    return own


def _longest_budget(tasks: Iterable[str], identity: Mapping[str, Any]) -> int | None:
    return max((budget for task in tasks if (budget := _budget(task, identity)) is not None), default=None)


def _metrics(members: Sequence[SampleResult]) -> list[str]:
    return sorted({sample.metric for sample in members if sample.metric})


def _version(members: Sequence[SampleResult]) -> str:
    """Versions of the metrics, from names such as 'number_match/1'."""
    return ", ".join(sorted({metric.rpartition("/")[2] for metric in _metrics(members)}))


def _cell_numbers(cell: Cell, members: Sequence[SampleResult]) -> dict[str, Any]:
    scored = [sample for sample in members if sample.status == "ok"]
    numbers: dict[str, Any] = {
        "task": cell.task,
        "length_tokens": cell.length_tokens,
        "depth": cell.depth,
        "num_samples": len(scored),
        "num_missing": len(members) - len(scored),
        "num_degenerate": sum(sample.degenerate is not None for sample in scored),
        "degenerate": dict(sorted(Counter(sample.degenerate for sample in scored if sample.degenerate).items())),
        "num_right": sum(sample.score >= 1.0 for sample in scored),
    }
    score = score_of(scored)
    if score is not None:
        numbers |= {
            "score": round(score.value, _DIGITS),
            "interval_95": [round(score.low, _DIGITS), round(score.high, _DIGITS)],
            "num_haystacks": score.num_clusters,
            "num_effective": round(score.num_effective, 2),
        }
    return numbers


def _effective(members: Sequence[SampleResult]) -> list[dict[str, Any]]:
    return [
        {
            "definition": length.definition,
            "by": length.by,
            "threshold": round(length.threshold, _DIGITS),
            "tokens": length.tokens,
            "open": length.is_open,
            "text": length.text(),
        }
        for length in needle_effective_lengths(members)
    ]


def _tail(members: Sequence[SampleResult]) -> dict[str, Any]:
    tail = tail_number(members)
    if not isinstance(tail, TailNumber):
        return {"value": None, "reason": tail.reason}
    ends = [round(tail.difference.low, _DIGITS), round(tail.difference.high, _DIGITS)]
    return {
        "value": round(tail.difference.value, _DIGITS),
        "interval_95": ends,
        "length_tokens": tail.length_tokens,
        "num_pairs": tail.num_pairs,
        "num_haystacks": tail.num_haystacks,
    }
