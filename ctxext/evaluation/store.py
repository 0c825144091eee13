"""Evaluated samples on disk: the result from which every table and picture is derived.

`run.json` says what was evaluated; `samples.jsonl` grows by one flushed line a sample, so a kill or a full disk loses
nothing finished; `results.json` is derived from it and can be remade.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ctxext.errors import ArtefactError
from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.statistics import Proportion, clustered_wilson
from ctxext.evaluation.suite import Cell
from ctxext.files import append_json_line, fingerprint, read_json, read_json_lines, write_json_atomic


@dataclass(frozen=True)
class SampleResult:
    """One answered prompt.

    Attributes:
        status: `ok`, or why there is no score (`out_of_memory`).
        needle_position: token index of the needle's first token in the prompt.
        haystack_sha256: of the sample's own haystack tokens; prompts with different ones are independent.
        score: 0 to 1 by `metric`.
        degenerate: `empty`, `repeating` or None.
        loss_blocks: mean next-token loss (nats) of each block of `loss_block_tokens` prompt positions.
        seconds: wall time; of prompts that were answered together, an equal share each.
        answers: the expected answers one by one; `expected` joins them.
        scores: of the deciding metric and those reported beside it.
        spans: token ranges [start, end, 1 when asked about] of everything that was placed into the prompt.
        facts: what else the task recorded.
    """

    sample_id: str
    task: str
    length_tokens: int
    depth: float
    index: int
    status: str
    needle_position: int
    haystack_sha256: str
    prompt_sha256: str
    key: str
    expected: str
    answer: str = ""
    answer_ids: list[int] = field(default_factory=list)
    score: float = 0.0
    metric: str = ""
    degenerate: str | None = None
    loss_blocks: list[float] = field(default_factory=list)
    loss_block_tokens: int = 0
    seconds: float = 0.0
    answers: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    spans: list[list[int]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        """The sample's place in the grid."""
        return Cell(self.task, self.length_tokens, self.depth)


class SampleStore:
    """The samples of one arm in one folder.

    Args:
        folder: created when missing.
        identity: what determines the answers (model, adapter, RoPE, dtype, suite wording); stored samples are reused
            only under the same identity.
        facts: what a reader wants to know besides (device, versions, command); does not decide reuse.

    Raises:
        ArtefactError: the folder holds samples of something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], facts: dict[str, Any]) -> None:
        self.folder = folder
        header = folder / "run.json"
        identity_hash = fingerprint(identity)
        if header.exists():
            stored = read_json(header)
            if stored.get("identity_hash") != identity_hash:
                differing = sorted(
                    key
                    for key in {*identity, *stored.get("identity", {})}
                    if identity.get(key) != stored.get("identity", {}).get(key)
                )
                raise ArtefactError(
                    "the folder holds an evaluation of something else",
                    where=str(folder),
                    got=", ".join(differing),
                    expected="the same model, positions and suite",
                    hint="Choose another folder or remove this one.",
                )
        else:
            write_json_atomic(header, {"identity_hash": identity_hash, "identity": identity, **facts})
        self.results: dict[str, SampleResult] = {result.sample_id: result for result in load_samples(folder)}

    def finished(self, sample_id: str, prompt_sha256: str) -> SampleResult | None:
        """The stored result of exactly this prompt, if it has a score."""
        result = self.results.get(sample_id)
        return result if result and result.prompt_sha256 == prompt_sha256 and result.status == "ok" else None

    def add(self, result: SampleResult) -> None:
        """Store one result durably."""
        append_json_line(self.folder / "samples.jsonl", asdict(result))
        self.results[result.sample_id] = result

    def write_results(self) -> None:
        """Derive `results.json` from the samples."""
        write_json_atomic(self.folder / "results.json", results_of(list(self.results.values())))


def load_samples(folder: Path) -> list[SampleResult]:
    """The stored samples of an arm, the last line of each sample counting.

    Raises:
        ArtefactError: a line that is no sample.
    """
    path = folder / "samples.jsonl"
    latest: dict[str, SampleResult] = {}
    for number, line in enumerate(read_json_lines(path), start=1):
        try:
            result = SampleResult(**line)
        except TypeError as error:
            raise ArtefactError(f"not a sample ({error})", where=f"{path}:{number}") from error
        latest[result.sample_id] = result
    return list(latest.values())


@dataclass(frozen=True)
class CellResult:
    """All scored samples of a cell; `proportion` is None when the cell has none."""

    cell: Cell
    num_samples: int
    num_missing: int
    num_degenerate: int
    proportion: Proportion | None


def grid_of(samples: list[SampleResult]) -> list[CellResult]:
    """Samples grouped into cells, ordered by length and depth."""
    results = []
    for cell in sorted({sample.cell for sample in samples}):
        members = [sample for sample in samples if sample.cell == cell]
        results.append(_cell_result(cell, members))
    return results


def by_length(samples: list[SampleResult]) -> dict[int, Proportion]:
    """Scored samples pooled over depths, by length."""
    pooled: dict[int, Proportion] = {}
    for length in sorted({sample.length_tokens for sample in samples}):
        scored = [s for s in samples if s.length_tokens == length and s.status == "ok"]
        if scored:
            pooled[length] = _share_right(scored)
    return pooled


def _cell_result(cell: Cell, members: list[SampleResult]) -> CellResult:
    scored = [sample for sample in members if sample.status == "ok"]
    return CellResult(
        cell=cell,
        num_samples=len(scored),
        num_missing=len(members) - len(scored),
        num_degenerate=sum(sample.degenerate is not None for sample in scored),
        proportion=_share_right(scored) if scored else None,
    )


def _share_right(scored: list[SampleResult]) -> Proportion:
    return clustered_wilson([sample.score >= 1.0 for sample in scored], [cluster_of(sample) for sample in scored])


def results_of(samples: list[SampleResult]) -> dict[str, Any]:
    """The derived `results.json`: cells and lengths with counts and Wilson 95% intervals."""

    def numbers(proportion: Proportion | None) -> dict[str, Any]:
        if proportion is None:
            return {"num_samples": 0}
        return {
            "accuracy": round(proportion.value, 6),
            "num_samples": proportion.num_trials,
            "num_right": proportion.num_successes,
            "wilson_95": [round(proportion.low, 6), round(proportion.high, 6)],
        }

    return {
        "results": {str(length): numbers(proportion) for length, proportion in by_length(samples).items()},
        "cells": [
            {
                "task": result.cell.task,
                "length_tokens": result.cell.length_tokens,
                "depth": result.cell.depth,
                "num_missing": result.num_missing,
                "num_degenerate": result.num_degenerate,
                **numbers(result.proportion),
            }
            for result in grid_of(samples)
        ],
        "num_samples": sum(sample.status == "ok" for sample in samples),
        "num_haystacks": len({sample.haystack_sha256 for sample in samples}),
        "metric": sorted({sample.metric for sample in samples if sample.metric}),
        "seconds": round(sum(sample.seconds for sample in samples), 1),
    }
