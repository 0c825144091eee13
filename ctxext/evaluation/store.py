"""Evaluated samples on disk: the result from which every table and picture is derived.

`run.json` says what was evaluated; `samples.jsonl` grows by one flushed line a sample, so a kill or a full disk loses
nothing finished; `results.json` is derived from it and can be remade. Half a line, which such an end can leave behind,
is set aside by whoever goes on writing; who only reads skips it, and changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ctxext.errors import ArtefactError
from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.scoring import METRICS
from ctxext.evaluation.statistics import MeanScore, Proportion, clustered_wilson, mean_score
from ctxext.evaluation.suite import Cell
from ctxext.files import append_json_line, fingerprint, read_json, write_bytes_atomic, write_json_atomic

RUN_NAME = "run.json"
SAMPLES_NAME = "samples.jsonl"
REJECTED_NAME = "samples.rejected.jsonl"
_RANK_FILE = "samples.rank{process}.jsonl"
_RANK_FILES = _RANK_FILE.format(process="*")
# Facts of `run.json` that follow the latest evaluation of the same prompts, whose grid may be wider.
_GRID_KEYS = ("suite", "original_length", "target_length", "ruler_files")

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleResult:
    """One answered prompt.

    Attributes:
        status: `ok`, or why there is no score: `out_of_memory`, `skipped` (a shorter one of the row was out of memory),
            `rejected` or `out_of_range` (by a backend).
        reason: the same for people.
        needle_position: token index of the needle's first token in the prompt.
        haystack_sha256: of the sample's own haystack tokens; prompts with different ones are independent.
        score: 0 to 1 by `metric`.
        degenerate: `empty`, `repeating`, `endless` or None.
        loss_blocks: mean next-token loss (nats) of each block of `loss_block_tokens` prompt positions.
        seconds: wall time; of prompts that were answered together, an equal share each.
        answers: the expected answers one by one; `expected` joins them.
        scores: of the deciding metric and those reported beside it.
        spans: token ranges [start, end, 1 when asked about] of everything that was placed into the prompt.
        facts: what else the task recorded.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

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
    reason: str = ""

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
        process: index of this process; all but the first write to files of their own, which the first gathers.

    Raises:
        ArtefactError: the folder holds samples of something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], facts: dict[str, Any], process: int = 0) -> None:
        self.folder = folder
        header = folder / RUN_NAME
        identity_hash = fingerprint(identity)
        if header.exists():
            stored = read_json(header)
            if stored.get("identity_hash") != identity_hash:
                raise _another_evaluation(folder, stored.get("identity", {}), identity)
            present = {**stored, **{key: facts[key] for key in _GRID_KEYS if key in facts}}
            if present != stored:
                write_json_atomic(header, present)
        else:
            write_json_atomic(header, {"identity_hash": identity_hash, "identity": identity, **facts})
        self.path = folder / (_RANK_FILE.format(process=process) if process else SAMPLES_NAME)
        self._num_read: dict[Path, int] = {}
        if self.path.exists():
            set_torn_lines_aside(self.path)
        self.results: dict[str, SampleResult] = {result.sample_id: result for result in load_samples(folder)}
        outdated = sorted({name for result in self.results.values() for name in outdated_metrics(result)})
        if outdated:
            raise _scored_otherwise(folder, ", ".join(outdated))

    def finished(self, sample_id: str, prompt_sha256: str) -> SampleResult | None:
        """The stored result of exactly this prompt, if it has a score."""
        result = self.results.get(sample_id)
        return result if result and result.prompt_sha256 == prompt_sha256 and result.status == "ok" else None

    def add(self, result: SampleResult) -> None:
        """Store one result durably."""
        append_json_line(self.path, asdict(result))
        self.results[result.sample_id] = result

    def news(self) -> list[SampleResult]:
        """What other processes have stored since the last call, as far as their lines are complete."""
        found = []
        for path in self._others():
            with path.open("rb") as stream:
                stream.seek(self._num_read.get(path, 0))
                data = stream.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._num_read[path] = self._num_read.get(path, 0) + len(whole)
            for line in filter(None, whole.split(b"\n")):
                with suppress(ValidationError):  # half a line, which `gather` sets aside
                    found.append(_SAMPLE.validate_json(line))
        self.results.update({result.sample_id: result for result in found})
        return found

    def gather(self) -> None:
        """Move what other processes have stored into this one's file; only while none of them writes.

        A kill on the way leaves lines twice, which count once.
        """
        for path in self._others():
            set_torn_lines_aside(path)
            for line in read_lines(path):
                if line.sample is None:
                    raise ArtefactError(f"not a sample ({line.problem})", where=line.place)
                self.add(line.sample)
            path.unlink()
            self._num_read.pop(path, None)

    def _others(self) -> list[Path]:
        return [path for path in self.folder.glob(_RANK_FILES) if path != self.path]


def outdated_metrics(result: SampleResult) -> list[str]:
    """Metrics of a stored score that are unknown today or have another version."""
    names = {result.metric, *result.scores} - {""} if result.status == "ok" else set()
    present = {metric.versioned for metric in METRICS.values()}
    return sorted(names - present)


def _another_evaluation(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> ArtefactError:
    if fingerprint(_without_metrics(stored)) == fingerprint(_without_metrics(wanted)):
        return _scored_otherwise(folder, ", ".join(sorted(_metrics_of(stored) - _metrics_of(wanted))))
    differing = sorted(key for key in {*wanted, *stored} if wanted.get(key) != stored.get(key))
    return ArtefactError(
        "the folder holds an evaluation of something else",
        where=str(folder),
        got=", ".join(differing),
        expected="the same model, positions and suite",
        hint="Choose another folder or remove this one.",
    )


def _scored_otherwise(folder: Path, metrics: str) -> ArtefactError:
    return ArtefactError(
        "the stored answers were scored by another metric or another version of it",
        where=str(folder),
        got=metrics or None,
        hint=f"`ctxext eval --rescore {folder}` scores them anew, without the model (--metric for another metric).",
    )


def _without_metrics(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_metrics(entry) for key, entry in value.items() if key != "metric"}
    return value


def _metrics_of(value: Any) -> set[str]:
    """Versioned names of all metrics that an identity names."""
    if not isinstance(value, dict):
        return set()
    found = set[str]()
    for key, entry in value.items():
        if key == "metric":
            found |= {entry} if isinstance(entry, str) else set(entry or ())
        else:
            found |= _metrics_of(entry)
    return found


def sample_files(folder: Path) -> list[Path]:
    """The files that hold an arm's samples, later ones counting; there are several while several processes write."""
    paths = [folder / SAMPLES_NAME, *sorted(folder.glob(_RANK_FILES))]
    return [path for path in paths if path.exists()]


@dataclass(frozen=True)
class StoredLine:
    """One line of a samples file.

    Attributes:
        sample: None where the line is none.
        torn: whether it is no JSON at all, as a kill in the middle of a write leaves it.
        problem: what is wrong with it.
    """

    path: Path
    number: int
    raw: bytes
    sample: SampleResult | None
    torn: bool = False
    problem: str | None = None

    @property
    def place(self) -> str:
        """'file:line'."""
        return f"{self.path}:{self.number}"


_SAMPLE: TypeAdapter[SampleResult] = TypeAdapter(SampleResult)


def read_lines(path: Path) -> Iterator[StoredLine]:
    """Every line of a samples file that is not empty."""
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            yield StoredLine(path, number, raw, _SAMPLE.validate_json(raw))
        except ValidationError as error:
            first = error.errors()[0]
            torn = first["type"] == "json_invalid"
            key = ".".join(str(part) for part in first["loc"])
            text = "half a line, or damaged" if torn else f"{key}: {first['msg']}" if key else first["msg"]
            yield StoredLine(path, number, raw, None, torn, text)


def load_samples(folder: Path) -> list[SampleResult]:
    """The stored samples of an arm, the last line of each sample counting; half lines are skipped with a warning.

    Raises:
        ArtefactError: a line that is JSON and no sample.
    """
    latest: dict[str, SampleResult] = {}
    for path in sample_files(folder):
        for line in read_lines(path):
            if line.sample is not None:
                latest[line.sample.sample_id] = line.sample
            elif line.torn:
                _LOG.warning("%s: not readable (%s); the line is skipped", line.place, line.problem)
            else:
                raise ArtefactError(f"not a sample ({line.problem})", where=line.place)
    return list(latest.values())


def set_torn_lines_aside(path: Path) -> int:
    """Move lines that are no JSON from a samples file into `samples.rejected.jsonl`; returns how many.

    They are written there first, so that a kill between the two steps loses nothing.
    """
    lines = path.read_bytes().split(b"\n")
    torn = {line.number: line for line in read_lines(path) if line.torn}
    if not torn:
        return 0
    rejected = path.with_name(REJECTED_NAME)
    for number, line in torn.items():
        text = line.raw.decode("utf-8", "backslashreplace")
        append_json_line(rejected, {"file": path.name, "line": number, "text": text})
    kept = [raw for number, raw in enumerate(lines, start=1) if number not in torn and raw.strip()]
    write_bytes_atomic(path, b"".join(raw + b"\n" for raw in kept))
    places = ", ".join(str(number) for number in torn)
    _LOG.warning("%s: line %s was cut short or damaged and is set aside in %s", path, places, rejected.name)
    return len(torn)


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


def score_of(samples: Iterable[SampleResult]) -> MeanScore | None:
    """Mean score of the samples that have one, clustered by haystack."""
    scored = [sample for sample in samples if sample.status == "ok"]
    return mean_score([s.score for s in scored], [cluster_of(s) for s in scored]) if scored else None


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
