"""Files made by NVIDIA RULER's own generators (https://github.com/NVIDIA/RULER), run and scored as RULER does.

Each line holds a prompt, the expected strings and, in newer versions, how the answer begins; the model reads `input`
and `answer_prefix` as one text, tokenised with the special tokens that the tokenizer adds by itself. Answers are greedy
and as long as RULER lets them be; a task scores the mean of `string_match_all` (QA: `string_match_part`) in percent.
Only such scores are called RULER's own. RULER has no depth grid: all samples of a task and length are one cell, and
where an answer stands is looked up in the text of the needle tasks. The `index` of a line is no name, since the needle
generator writes the answer's character position there (NVIDIA/RULER, scripts/data/synthetic/niah.py, July 2026):
samples are numbered by line.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctxext.errors import ArtefactError, UsageError, unknown_name
from ctxext.evaluation.clusters import NOISE_FACT
from ctxext.evaluation.effective_length import RULER_TASKS, EffectiveLength, ruler_effective_length
from ctxext.evaluation.haystack import NOISE
from ctxext.evaluation.prompt import Prompt
from ctxext.evaluation.scoring import BESIDE, METRICS
from ctxext.evaluation.store import SampleResult
from ctxext.evaluation.suite import Cell, Sample, Suite
from ctxext.evaluation.tasks.base import SPREAD_DEPTH, Span
from ctxext.files import sha256_bytes, sha256_file

# Answer tokens by the beginning of the task's name (RULER, scripts/data/synthetic/constants.py).
_BUDGETS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
_SHORTEST = 32
# Tells samples of RULER's files from those of a suite; nothing says what else stands in their texts.
RULER_FACT = "ruler_line"
# Texts that have half of their eight-word pieces in common are one text with something else hidden in it.
_PIECE_WORDS = 8
_SKETCH = 64
_WORDS_COMPARED = 5000


@dataclass(frozen=True)
class RulerRow:
    """One line of a file.

    Attributes:
        number: of the line, from 1.
        text: the whole prompt, the answer's beginning included.
        outputs: the expected strings.
        length: RULER's count of prompt and answer tokens; None where the file does not say.
        index: as the file has it.
    """

    number: int
    text: str
    outputs: tuple[str, ...]
    length: int | None
    index: int | None


@dataclass(frozen=True)
class RulerFile:
    """One task at one length.

    Attributes:
        length_tokens: RULER's `max_seq_length`, prompt and answer together.
        length_from: who says so.
    """

    path: Path
    task: str
    length_tokens: int
    length_from: str
    sha256: str
    rows: tuple[RulerRow, ...]
    texts: tuple[str, ...] = field(repr=False, default=())

    @property
    def metric(self) -> str:
        """Which of RULER's two metrics decides."""
        return ruler_metric(self.task)

    @property
    def max_new_tokens(self) -> int:
        """RULER's `tokens_to_generate`."""
        return ruler_budget(self.task)

    @property
    def samples(self) -> list[Sample]:
        """One a line."""
        return line_samples(self.task, self.length_tokens, len(self.rows))

    def about(self) -> dict[str, Any]:
        """What is stored of it, enough to find it again."""
        return {
            "path": str(self.path),
            "task": self.task,
            "length_tokens": self.length_tokens,
            "length_from": self.length_from,
            "sha256": self.sha256,
            "num_samples": len(self.rows),
            "num_texts": len(set(self.texts)),
        }


def line_samples(task: str, length_tokens: int, num_lines: int) -> list[Sample]:
    """The samples of a file, one a line."""
    cell = Cell(task, length_tokens, SPREAD_DEPTH)
    return [Sample(cell, index) for index in range(num_lines)]


def ruler_metric(task: str) -> str:
    """The metric of RULER's scripts/eval/synthetic/constants.py."""
    return "string_match_part" if task.startswith("qa") else "string_match_all"


def ruler_budget(task: str) -> int:
    """Answer tokens of a task."""
    return next(tokens for start, tokens in _BUDGETS.items() if task.startswith(start))


def ruler_identity() -> dict[str, Any]:
    """How the answers are made and scored; the prompts are told apart by their own hashes."""
    return {
        "tasks": {
            task: {
                "task": "ruler_file",
                "metric": [METRICS[name].versioned for name in (ruler_metric(task), *BESIDE[ruler_metric(task)])],
                "max_new_tokens": ruler_budget(task),
            }
            for task in RULER_TASKS
        }
    }


def find_ruler_files(names: Sequence[str]) -> list[Path]:
    """The .jsonl files that are named, or lie below a named folder.

    Raises:
        ArtefactError: nothing there.
    """
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        found = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not found or not all(each.is_file() for each in found):
            raise ArtefactError("no RULER file here", where=name, expected="a .jsonl file or a folder with some")
        paths += found
    return paths


def read_ruler_file(path: Path, *, task: str | None = None, length_tokens: int | None = None) -> RulerFile:
    """Read a generated file; task and length come from its place (`4096/data/niah_single_1/validation.jsonl`).

    Args:
        task: one of RULER's 13, when the path does not say.
        length_tokens: RULER's `max_seq_length`, when the path does not say.

    Raises:
        UsageError: unknown task or length.
        ArtefactError: unreadable, or a line that is no RULER sample, with its number.
    """
    chosen = task or _task_of(path)
    if chosen not in RULER_TASKS:
        raise unknown_name("RULER task", chosen, RULER_TASKS, where="--ruler-task")
    rows = _rows(path)
    longest = max((row.length for row in rows if row.length is not None), default=None)
    length, source = (length_tokens, "--ruler-length") if length_tokens else _length_of(path, longest)
    if longest is not None and longest > length:
        raise UsageError(
            "the file's own lengths exceed the length it was made for",
            where=str(path),
            got=longest,
            expected=f"at most {length} ({source})",
            hint="Give the right --ruler-length.",
        )
    return RulerFile(path, chosen, length, source, sha256_file(path), tuple(rows), _text_ids(rows))


def reread_ruler_file(about: Mapping[str, Any]) -> RulerFile:
    """A file that was evaluated before, unchanged.

    Raises:
        ArtefactError: not there any more, or another one.
    """
    path = Path(about["path"])
    if not path.is_file() or sha256_file(path) != about["sha256"]:
        what = "changed" if path.is_file() else "not there any more"
        raise ArtefactError(f"the RULER file that was evaluated is {what}", where=str(path))
    return read_ruler_file(path, task=about["task"], length_tokens=about["length_tokens"])


def read_ruler_files(
    names: Sequence[str], *, task: str | None = None, length_tokens: int | None = None
) -> list[RulerFile]:
    """All files behind the names, ordered by length and task.

    Raises:
        UsageError: two files for one task and length; see also `read_ruler_file`.
        ArtefactError: see `read_ruler_file`.
    """
    files: dict[tuple[int, int], RulerFile] = {}
    for path in find_ruler_files(names):
        file = read_ruler_file(path, task=task, length_tokens=length_tokens)
        place = file.length_tokens, RULER_TASKS.index(file.task)
        if place in files:
            raise UsageError(
                f"two files for task {file.task} at {file.length_tokens:,} tokens",
                where=str(path),
                got=str(files[place].path),
                hint="--ruler-task and --ruler-length hold for all files; evaluate files without a place one by one.",
            )
        files[place] = file
    return [files[place] for place in sorted(files)]


class RulerBuilder:
    """Makes the prompts of RULER files for one tokenizer."""

    def __init__(self, tokenizer: Any, files: Iterable[RulerFile]) -> None:
        self._tokenizer = tokenizer
        self._files = {(file.task, file.length_tokens): file for file in files}

    def build(self, sample: Sample) -> Prompt:
        """The prompt of a line, tokenised as RULER's pipeline does.

        Raises:
            KeyError: no such file or line.
        """
        file = self._files[sample.cell.task, sample.cell.length_tokens]
        row = file.rows[sample.index] if sample.index < len(file.rows) else None
        if row is None:
            raise KeyError(sample.sample_id)
        ids, spans = self._encoded(row, locate=file.task.startswith("niah"))
        noise = row.text.count(NOISE) > 1
        return Prompt(
            sample=sample,
            input_ids=ids,
            answers=row.outputs,
            metric=file.metric,
            spans=spans,
            needle_position=min((span.start for span in spans), default=0),
            haystack_sha256=file.texts[sample.index],
            key="",
            distractors=(),
            max_new_tokens=file.max_new_tokens,
            facts={
                RULER_FACT: row.number,
                "ruler_length": row.length,
                "num_prompt_tokens": len(ids),
                **({NOISE_FACT: "noise"} if noise else {}),
            },
        )

    def _encoded(self, row: RulerRow, *, locate: bool) -> tuple[list[int], tuple[Span, ...]]:
        """Token ids, and where the expected strings first stand, if that can be told."""
        if not (locate and getattr(self._tokenizer, "is_fast", False)):
            return list(self._tokenizer(row.text, verbose=False).input_ids), ()
        encoded = self._tokenizer(row.text, verbose=False, return_offsets_mapping=True)
        return list(encoded.input_ids), tuple(_spans(row, encoded.offset_mapping))


def require_reach(builder: RulerBuilder, samples: Iterable[Sample], reach: int, model: str) -> None:
    """Refuse prompts that end, with their answers, beyond the positions that the model has.

    Raises:
        UsageError: the longest one does.
    """
    prompts = ((builder.build(sample), sample) for sample in samples)
    longest, sample = max(
        ((len(prompt.input_ids) + prompt.max_new_tokens, sample) for prompt, sample in prompts),
        key=lambda pair: pair[0],
    )
    if longest > reach:
        raise UsageError(
            f"the longest prompt and its answer take {longest:,} positions with this model's tokenizer "
            f"({sample.sample_id})",
            where=model,
            expected=f"at most {reach:,}, which this model reaches",
            hint="Make files of a smaller max_seq_length, extend the model, or give --beyond-reach.",
        )


def ruler_suite(files: Sequence[RulerFile]) -> Suite:
    """What the engine wants to know besides the prompts: no losses."""
    row = {"length": max(file.length_tokens for file in files), "depths": [SPREAD_DEPTH], "samples": 1}
    return Suite.model_validate({"description": "RULER's own files", "grid": [row], "measure_loss": False})


@dataclass(frozen=True)
class RulerScores:
    """RULER's own numbers.

    Attributes:
        task_means: by length and task, 0 to 1.
        num_samples: likewise.
        num_missing: samples without a score, likewise.
        averages: mean of the 13 tasks, of lengths that have all of them.
        effective_length: None when a length lacks tasks or samples; `reason` says which.
    """

    task_means: dict[int, dict[str, float]]
    num_samples: dict[int, dict[str, int]]
    num_missing: dict[int, dict[str, int]]
    averages: dict[int, float]
    effective_length: EffectiveLength | None
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        """Scores in percent with two digits, as RULER writes them."""
        effective = self.effective_length
        return {
            "scores": {str(n): {t: percent(v) for t, v in means.items()} for n, means in self.task_means.items()},
            "num_samples": {str(length): counts for length, counts in self.num_samples.items()},
            "num_missing": {str(length): counts for length, counts in self.num_missing.items() if any(counts.values())},
            "average_of_13": {str(length): percent(value) for length, value in self.averages.items()},
            "effective_length": effective.tokens if effective else None,
            "effective_length_text": effective.text() if effective else self.reason,
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = []
        for length, means in self.task_means.items():
            for task, mean in means.items():
                missing = self.num_missing[length][task]
                lost = f", {missing} without a score" if missing else ""
                lines.append(
                    f"{length:>9,}  {task:<16} {percent(mean):6.2f}  of {self.num_samples[length][task]} samples{lost}"
                )
            if length in self.averages:
                lines.append(f"{length:>9,}  {'mean of 13 tasks':<16} {percent(self.averages[length]):6.2f}")
        text = self.effective_length.text() if self.effective_length else f"not given: {self.reason}"
        return [*lines, f"RULER's effective length (mean of 13 tasks above 85.6): {text}"]


def ruler_scores(samples: Sequence[SampleResult]) -> RulerScores:
    """RULER's own numbers of samples that were scored by RULER's metrics.

    Raises:
        ArtefactError: samples that another metric has scored.
    """
    means: dict[int, dict[str, float]] = {}
    counts: dict[int, dict[str, int]] = {}
    missing: dict[int, dict[str, int]] = {}
    for length in sorted({sample.length_tokens for sample in samples}):
        for task in RULER_TASKS:
            members = [s for s in samples if (s.length_tokens, s.task) == (length, task)]
            scored = [s for s in members if s.status == "ok"]
            if others := {s.metric for s in scored} - {METRICS[ruler_metric(task)].versioned}:
                raise ArtefactError(
                    "not scored by RULER's metric, so these are not RULER's own scores",
                    where=f"{task} at {length:,} tokens",
                    got=", ".join(sorted(others)),
                    expected=METRICS[ruler_metric(task)].versioned,
                )
            if scored:
                means.setdefault(length, {})[task] = math.fsum(s.score for s in scored) / len(scored)
                counts.setdefault(length, {})[task] = len(scored)
                missing.setdefault(length, {})[task] = len(members) - len(scored)
    whole = {
        length: math.fsum(by_task.values()) / len(RULER_TASKS)
        for length, by_task in means.items()
        if len(by_task) == len(RULER_TASKS)
    }
    found, reason = _effective(means, missing)
    return RulerScores(means, counts, missing, whole, found, reason)


def percent(score: float) -> float:
    """As RULER writes scores."""
    return round(score * 100, 2)


def _effective(
    means: Mapping[int, Mapping[str, float]], missing: Mapping[int, Mapping[str, int]]
) -> tuple[EffectiveLength | None, str | None]:
    lost = [f"{length:,}" for length, counts in missing.items() if any(counts.values())]
    if lost:
        return None, f"samples without a score at {', '.join(lost)} tokens"
    if not means:
        return None, "no sample has a score"
    for length, by_task in means.items():
        absent = [task for task in RULER_TASKS if task not in by_task]
        if absent:
            return None, f"it needs all 13 tasks, and {length:,} tokens lack {', '.join(absent)}"
    return ruler_effective_length(means), None


def _task_of(path: Path) -> str:
    """The task that a path names: its folder (as RULER writes it) or its own name."""
    for name in (path.parent.name, path.stem):
        if name in RULER_TASKS:
            return name
    raise UsageError(
        "the path does not say which of RULER's tasks this is",
        where=str(path),
        expected=f"--ruler-task with one of {', '.join(RULER_TASKS)}",
    )


def _length_of(path: Path, longest: int | None) -> tuple[int, str]:
    """`max_seq_length` from the nearest folder that is a number which the rows fit into; else their largest length."""
    for name in reversed(path.absolute().parts[:-1]):
        if name.isdecimal() and int(name) >= max(longest or 0, _SHORTEST):
            return int(name), "the path"
    if longest is None:
        raise UsageError(
            "neither the path nor the file says for which length it was made",
            where=str(path),
            expected="--ruler-length with RULER's max_seq_length",
        )
    return longest, "the longest line"


def _rows(path: Path) -> list[RulerRow]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"could not read the file ({error})", where=str(path)) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_row(line, number, f"{path}:{number}"))
    if not rows:
        raise ArtefactError("the file has no samples", where=str(path))
    return rows


def _row(line: str, number: int, where: str) -> RulerRow:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ArtefactError("not valid JSON", where=where) from error
    if not isinstance(values, dict) or not isinstance(values.get("input"), str) or not values["input"]:
        raise ArtefactError("not a RULER sample: it has no text in 'input'", where=where)
    prefix = values.get("answer_prefix", "")
    outputs = values.get("outputs", [values["output"]] if "output" in values else None)
    if not isinstance(outputs, list) or not outputs or not all(isinstance(text, str) and text for text in outputs):
        raise ArtefactError("not a RULER sample: 'outputs' is no list of expected strings", where=where, got=outputs)
    if not isinstance(prefix, str):
        raise ArtefactError("not a RULER sample: 'answer_prefix' is no text", where=where)
    length, index = values.get("length"), values.get("index")
    return RulerRow(
        number,
        values["input"] + prefix,
        tuple(outputs),
        length if type(length) is int and length > 0 else None,
        index if type(index) is int else None,
    )


def _spans(row: RulerRow, offsets: Sequence[tuple[int, int]]) -> list[Span]:
    """Token ranges of the first places of the expected strings; none for a string that is not in the text."""
    spans = []
    for text in row.outputs:
        start = row.text.find(text)
        tokens = [i for i, (a, b) in enumerate(offsets) if a < start + len(text) and b > start and b > a]
        if start >= 0 and tokens:
            spans.append(Span(tokens[0], tokens[-1] + 1, asked=True))
    return sorted(spans, key=lambda span: span.start)


def _text_ids(rows: Sequence[RulerRow]) -> tuple[str, ...]:
    """For every row what identifies its text: rows of mostly the same text are not independent of each other.

    RULER hides its needles in one order of the same essays; half of the pieces in common mean one text.
    """
    representatives: list[tuple[frozenset[int], str]] = []
    ids = []
    for row in rows:
        sketch = _sketch(row.text)
        known = next((name for other, name in representatives if _alike(sketch, other)), None)
        if known is None:
            known = sha256_bytes(row.text.encode())
            representatives.append((sketch, known))
        ids.append(known)
    return tuple(ids)


def _sketch(text: str) -> frozenset[int]:
    """The smallest hashes of a text's pieces of eight words: a random choice of pieces that equal texts share."""
    words = text.split(maxsplit=_WORDS_COMPARED)[:_WORDS_COMPARED]
    pieces = {
        zlib.crc32(" ".join(words[start : start + _PIECE_WORDS]).encode())
        for start in range(max(len(words) - _PIECE_WORDS + 1, 1))
    }
    return frozenset(sorted(pieces)[:_SKETCH])


def _alike(first: frozenset[int], second: frozenset[int]) -> bool:
    return 2 * len(first & second) >= max(len(first), len(second))
