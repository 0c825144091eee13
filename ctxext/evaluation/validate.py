"""Is a stored evaluation what it says? Every line, every score and prompts made again show what was changed or lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctxext.errors import ArtefactError, CtxextError
from ctxext.evaluation.prompt import draft_of
from ctxext.evaluation.reconstruct import Builder, differences, text_differences
from ctxext.evaluation.rescore import expected_answers, rescored
from ctxext.evaluation.results import RESULTS_NAME, derived_results
from ctxext.evaluation.scoring import degenerate_kind
from ctxext.evaluation.store import (
    RUN_NAME,
    SAMPLES_NAME,
    SampleResult,
    StoredLine,
    outdated_metrics,
    read_lines,
    sample_files,
)
from ctxext.evaluation.suite import Cell, Sample, Suite
from ctxext.files import fingerprint, read_json

# Prompts that are made again when not all are asked for.
FEW_PROMPTS = 20
_FEW_KEYS = 5


@dataclass(frozen=True)
class Problem:
    """Something wrong: `where` is file:line or a file."""

    where: str
    what: str

    def text(self) -> str:
        """'file:line: what'."""
        return f"{self.where}: {self.what}"


@dataclass
class Validation:
    """What was looked at and what was found.

    Attributes:
        notes: what could not be checked, and what is worth knowing but not wrong.
    """

    num_lines: int = 0
    num_samples: int = 0
    num_rebuilt: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One sentence."""
        found = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}" if self.problems else "in order"
        return (
            f"{self.num_lines} lines, {self.num_samples} samples, {self.num_rebuilt} prompts made again with equal "
            f"hash: {found}"
        )


@dataclass(frozen=True)
class Expectations:
    """What an arm's folder should hold.

    Attributes:
        suite: None when the prompts come from elsewhere or nothing says which suite it was.
        wanted: the samples of the grid; None when unknown.
        builder: makes the prompts; None when the tokenizer is not there.
        decode: token ids of an answer to its text; None likewise.
    """

    suite: Suite | None
    wanted: Sequence[Sample] | None
    builder: Builder | None = None
    decode: Callable[[list[int]], str] | None = None


def validate_folder(folder: Path, expected: Expectations, *, every_prompt: bool = False) -> Validation:
    """Check an arm's folder against its suite.

    Args:
        every_prompt: make every prompt again instead of `FEW_PROMPTS` spread over the samples.

    Raises:
        ArtefactError: no samples here at all.
    """
    found = Validation()
    files = sample_files(folder)
    if not files:
        raise ArtefactError("no samples here", where=str(folder), expected=SAMPLES_NAME)
    run = _header(folder, expected.suite, found)
    lines = [line for path in files for line in read_lines(path)]
    found.num_lines = len(lines)
    found.problems += [
        Problem(line.place, line.problem if line.torn else f"not a sample ({line.problem})")
        for line in lines
        if line.sample is None and line.problem
    ]
    latest = _latest(lines, found)
    found.num_samples = len(latest)
    thinking = bool(run.get("identity", {}).get("thinking", False))
    for line, sample in latest:
        for what in (*_wrong_with(sample, expected, thinking), *_another_metric(sample, run.get("identity", {}))):
            found.problems.append(Problem(line.place, f"{sample.sample_id}: {what}"))
    _complete(folder, [sample for _, sample in latest], expected, found)
    _prompts(latest, expected, run, every_prompt, found)
    _results(folder, expected.suite, found)
    return found


def _header(folder: Path, suite: Suite | None, found: Validation) -> dict[str, Any]:
    path = folder / RUN_NAME
    try:
        run: dict[str, Any] = read_json(path)
    except ArtefactError as error:
        found.problems.append(Problem(str(path), error.what))
        return {}
    identity = run.get("identity", {})
    if run.get("identity_hash") != fingerprint(identity):
        found.problems.append(Problem(str(path), "identity_hash is not the hash of identity, which was changed"))
    for difference in text_differences(suite, run):
        found.notes.append(f"{path}: differs here, so prompts cannot be made again: {difference}")
    return run


def _latest(lines: Sequence[StoredLine], found: Validation) -> list[tuple[StoredLine, SampleResult]]:
    """The line that counts of every sample; a second answer to one sample is a problem, a second try is none."""
    latest: dict[str, tuple[StoredLine, SampleResult]] = {}
    for line in lines:
        if line.sample is None:
            continue
        earlier = latest.get(line.sample.sample_id)
        if earlier is not None and earlier[1].status == "ok":
            first = earlier[0]
            place = f"line {first.number}" if first.path == line.path else first.place
            found.problems.append(Problem(line.place, f"{line.sample.sample_id} was answered before, in {place}"))
        latest[line.sample.sample_id] = line, line.sample
    return list(latest.values())


def _wrong_with(sample: SampleResult, expected: Expectations, thinking: bool) -> Iterator[str]:
    """Everything that one sample shows by itself."""
    place = Sample(Cell(sample.task, sample.length_tokens, sample.depth), sample.index)
    if place.sample_id != sample.sample_id:
        yield f"its task, length, depth and index make another id ({place.sample_id})"
        return
    yield from _wrong_place(sample)
    if expected.suite is not None:
        yield from _wrong_question(sample, expected.suite)
    if sample.status != "ok":
        return
    if expected.decode is not None and expected.decode(sample.answer_ids) != sample.answer:
        yield "the answer is not what its token ids say"
    kind = degenerate_kind(sample.answer, sample.answer_ids)
    if sample.degenerate != kind and (kind, sample.degenerate) != (None, "endless"):
        yield f"called {sample.degenerate or 'not degenerate'}, but its answer is {kind or 'not'}"
    if outdated := outdated_metrics(sample):
        yield f"scored by {', '.join(outdated)}, which is not the present version (see --rescore)"
        return
    yield from _wrong_score(sample, expected.suite, thinking)


def _wrong_place(sample: SampleResult) -> Iterator[str]:
    limit = sample.length_tokens
    if not 0 <= sample.needle_position < limit:
        yield f"the needle's position {sample.needle_position} is outside the prompt of {limit} tokens"
    for start, end, _ in (span if len(span) == 3 else [-1, -1, 0] for span in sample.spans):
        if not 0 <= start < end <= limit:
            yield f"a span from {start} to {end} is outside the prompt of {limit} tokens"
    asked = [span for span in sample.spans if len(span) == 3 and span[2]]
    if asked and sample.needle_position not in [start for start, _, _ in asked]:
        yield f"no asked span begins at the needle's position {sample.needle_position}"


def _wrong_question(sample: SampleResult, suite: Suite) -> Iterator[str]:
    try:
        draft = draft_of(suite, Sample(sample.cell, sample.index))
    except KeyError:
        yield "its task is not one of the suite's"
        return
    except CtxextError as error:
        yield f"the suite has no such sample ({error})"
        return
    if (draft.key, list(draft.answers)) != (sample.key, expected_answers(sample)):
        yield (
            f"the suite asks about '{draft.key}' and expects '{' | '.join(draft.answers)}' here, stored are "
            f"'{sample.key}' and '{sample.expected}'"
        )


def _wrong_score(sample: SampleResult, suite: Suite | None, thinking: bool) -> Iterator[str]:
    try:
        again = rescored(sample, suite, thinking=thinking)
    except CtxextError as error:
        yield f"the score cannot be checked: {error.what}"
        return
    if again.score != sample.score:
        yield f"score {sample.score:g}, but {sample.metric} gives its answer {again.score:g}"
    elif sample.scores and again.scores != sample.scores:
        differing = sorted(name for name in {**again.scores, **sample.scores} if _differ(name, again, sample))
        yield f"the stored scores beside the deciding one are not what the metrics give ({', '.join(differing)})"


def _another_metric(sample: SampleResult, identity: dict[str, Any]) -> Iterator[str]:
    """`run.json` says which metric decides; without it nothing would tell that only some samples were scored anew."""
    named = identity.get("tasks", {}).get(sample.task, identity).get("metric")
    deciding = named[0] if isinstance(named, list) and named else named
    if sample.status == "ok" and deciding is not None and deciding != sample.metric:
        yield f"scored by {sample.metric}, but {RUN_NAME} says {deciding} (see --rescore)"


def _differ(name: str, first: SampleResult, second: SampleResult) -> bool:
    return first.scores.get(name) != second.scores.get(name)


def _complete(folder: Path, samples: Sequence[SampleResult], expected: Expectations, found: Validation) -> None:
    """Every sample of the grid is there; samples of another grid are only worth a note."""
    if expected.wanted is None:
        found.notes.append(f"{folder}: nothing says which samples belong here")
        return
    stored = {sample.sample_id: sample for sample in samples}
    missing = Counter(sample.cell for sample in expected.wanted if sample.sample_id not in stored)
    whole = Counter(sample.cell for sample in expected.wanted)
    for cell, count in sorted(missing.items()):
        place = f"cell {cell.task}, {cell.length_tokens} tokens, depth {cell.depth:g}"
        found.problems.append(Problem(str(folder / SAMPLES_NAME), f"{place}: {count} of {whole[cell]} samples missing"))
    wanted = {sample.sample_id for sample in expected.wanted}
    if others := sum(sample_id not in wanted for sample_id in stored):
        found.notes.append(f"{folder}: {others} samples are not of the suite's grid")
    if unscored := Counter(sample.status for sample in samples if sample.status != "ok"):
        text = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in sorted(unscored.items()))
        found.notes.append(f"{folder}: samples without a score: {text}")


def _prompts(
    latest: Sequence[tuple[StoredLine, SampleResult]],
    expected: Expectations,
    run: dict[str, Any],
    every_prompt: bool,
    found: Validation,
) -> None:
    """Make prompts again: equal hash, equal places."""
    if expected.builder is None or (expected.suite is not None and text_differences(expected.suite, run)):
        found.notes.append("no prompt was made again")
        return
    step = 1 if every_prompt else max(len(latest) // FEW_PROMPTS, 1)
    for line, sample in latest[::step]:
        try:
            prompt = expected.builder.build(Sample(sample.cell, sample.index))
        except (CtxextError, KeyError) as error:
            found.problems.append(Problem(line.place, f"{sample.sample_id}: no prompt can be made ({error})"))
            continue
        if prompt.prompt_sha256 != sample.prompt_sha256:
            why = "; ".join(differences(prompt, sample, expected.suite, run))
            found.problems.append(Problem(line.place, f"{sample.sample_id}: its prompt is another one today ({why})"))
            continue
        found.num_rebuilt += 1
        spans = [[span.start, span.end, int(span.asked)] for span in prompt.spans]
        if prompt.needle_position != sample.needle_position or (sample.spans and spans != sample.spans):
            found.problems.append(
                Problem(
                    line.place,
                    f"{sample.sample_id}: the needle stands at {prompt.needle_position}, not at "
                    f"{sample.needle_position}, or its spans are others",
                )
            )
        if prompt.haystack_sha256 != sample.haystack_sha256:
            found.problems.append(Problem(line.place, f"{sample.sample_id}: haystack_sha256 is not the haystack's"))


def _results(folder: Path, suite: Suite | None, found: Validation) -> None:
    path = folder / RESULTS_NAME
    try:
        stored = read_json(path)
        derived = derived_results(folder, suite=suite.model_dump(mode="json") if suite else None)
    except ArtefactError as error:
        found.problems.append(Problem(str(path), f"cannot be compared with the samples ({error})"))
        return
    if stored != derived:
        keys = sorted(key for key in {**derived, **stored} if derived.get(key) != stored.get(key))
        some = f"{', '.join(keys[:_FEW_KEYS])}{f' and {len(keys) - _FEW_KEYS} more' if len(keys) > _FEW_KEYS else ''}"
        what = f"not what the samples give: {some} (`ctxext report` writes it anew)"
        found.problems.append(Problem(str(path), what))
