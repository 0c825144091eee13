"""Score stored answers again, without the model: by the present version of their metric, or by another metric.

The old samples stay beside the new ones. What the answers were scored by belongs to an evaluation's identity, so that
too is written anew; the answers themselves never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctxext.errors import ArtefactError, UsageError, unknown_name
from ctxext.evaluation.prompt import draft_of
from ctxext.evaluation.results import write_results
from ctxext.evaluation.ruler_file import RULER_FACT
from ctxext.evaluation.scoring import BESIDE, METRICS, final_answer, score_all
from ctxext.evaluation.store import RUN_NAME, SAMPLES_NAME, SampleResult, load_samples, sample_files
from ctxext.evaluation.suite import Sample, Suite
from ctxext.files import canonical_json, fingerprint, read_json, write_bytes_atomic, write_json_atomic

# The metrics that look at what else stood in the text.
_NEED_DISTRACTORS = {"first_match_all"}


@dataclass(frozen=True)
class Rescored:
    """What another scoring changed.

    Attributes:
        num_answers: answers that have a score.
        changed: each sample before and after, where score or metric differ.
        kept: the old samples; None when nothing had to be written.
    """

    num_answers: int
    changed: list[tuple[SampleResult, SampleResult]]
    kept: Path | None

    @property
    def flipped(self) -> list[tuple[SampleResult, SampleResult]]:
        """Answers that were right and are wrong now, or the other way round."""
        return [(old, new) for old, new in self.changed if (old.score >= 1.0) != (new.score >= 1.0)]

    def summary(self) -> str:
        """One sentence."""
        became_right = sum(new.score >= 1.0 for _, new in self.flipped)
        moved = sum(old.score != new.score for old, new in self.changed)
        before, after = (
            (", ".join(sorted({sample.metric for sample in side})) for side in zip(*self.changed, strict=True))
            if self.changed
            else ("", "")
        )
        metrics = f" ({before} before, {after} now)" if before != after else ""
        return (
            f"{self.num_answers} answers scored anew{metrics}: {moved} scores differ, {became_right} answers are right "
            f"that were wrong, {len(self.flipped) - became_right} are wrong that were right"
        )


def rescored(sample: SampleResult, suite: Suite | None, metric: str | None = None, *, thinking: bool) -> SampleResult:
    """A sample with the present score of its answer; one without an answer stays as it is.

    Args:
        suite: what the prompt was made from; only metrics that know distractors need it.
        metric: the deciding metric; the sample's own by default.
        thinking: whether only what follows the model's thoughts counts.

    Raises:
        UsageError: unknown metric, or one that needs a suite where there is none.
        ArtefactError: the suite draws another sample today than it did.
    """
    if sample.status != "ok":
        return sample
    name = metric or sample.metric.rpartition("/")[0]
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS, where=sample.sample_id)
    answers = expected_answers(sample)
    distractors: tuple[str, ...] = ()
    if _NEED_DISTRACTORS & {name, *BESIDE[name]}:
        distractors = _distractors(sample, suite, answers)
    said = final_answer(sample.answer) if thinking else sample.answer
    scores = score_all(said, answers, distractors, metric=name)
    deciding = METRICS[name].versioned
    # Samples of older versions hold the deciding score alone, and stay comparable.
    beside = scores if sample.scores or metric else {}
    return replace(sample, metric=deciding, score=scores[deciding], scores=beside)


def expected_answers(sample: SampleResult) -> list[str]:
    """The expected answers one by one, which the oldest samples hold as one text."""
    return sample.answers or [sample.expected]


def rescore_folder(folder: Path, suite: Suite | None, metric: str | None = None) -> Rescored:
    """Score an arm's stored answers anew; the old samples stay as `samples.before-rescore-N.jsonl`.

    Raises:
        UsageError, ArtefactError: see `rescored`; or the folder's evaluation has not ended.
    """
    if any(path.name != SAMPLES_NAME for path in sample_files(folder)):
        raise ArtefactError(
            "several processes were writing samples and did not end",
            where=str(folder),
            hint="Run the same `ctxext eval` again first; it gathers them.",
        )
    header = folder / RUN_NAME
    run: dict[str, Any] = read_json(header)
    thinking = bool(run.get("identity", {}).get("thinking", False))
    before = load_samples(folder)
    after = [rescored(sample, suite, metric, thinking=thinking) for sample in before]
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    identity = with_metrics(run.get("identity", {}), metric)
    kept = None
    if changed:
        kept = _put_beside(folder / SAMPLES_NAME)
        try:
            _write_samples(folder / SAMPLES_NAME, after)
        except BaseException:
            kept.unlink()
            raise
    if identity != run.get("identity"):
        write_json_atomic(header, {**run, "identity_hash": fingerprint(identity), "identity": identity})
    write_results(folder, suite=suite.model_dump(mode="json") if suite else None)
    return Rescored(sum(sample.status == "ok" for sample in after), changed, kept)


def with_metrics(identity: dict[str, Any], metric: str | None) -> dict[str, Any]:
    """An evaluation's identity with the present versions of its metrics, or with another metric.

    Raises:
        UsageError: a metric that no longer exists.
    """
    changed = dict(identity)
    if "metric" in identity:
        changed["metric"] = _present(metric or _name(identity["metric"]))
    if "tasks" in identity:
        changed["tasks"] = {task: _task_with_metric(options, metric) for task, options in identity["tasks"].items()}
    return changed


def _task_with_metric(options: dict[str, Any], metric: str | None) -> dict[str, Any]:
    name = metric or _name(options["metric"][0])
    return {**options, "metric": [_present(each) for each in (name, *BESIDE.get(name, ()))]}


def _name(versioned: str) -> str:
    return versioned.rpartition("/")[0]


def _present(name: str) -> str:
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    return METRICS[name].versioned


def _distractors(sample: SampleResult, suite: Suite | None, answers: Sequence[str]) -> tuple[str, ...]:
    if RULER_FACT in sample.facts:
        return ()
    if suite is None:
        raise UsageError(
            "the metric knows wrong answers that stood in the text, and nothing here says which suite made the text",
            where=sample.sample_id,
            hint="Score the whole run or evaluation folder instead of a part of it.",
        )
    try:
        draft = draft_of(suite, Sample(sample.cell, sample.index))
    except KeyError as error:
        raise ArtefactError("the stored suite has no such task", where=sample.sample_id, got=sample.task) from error
    if list(draft.answers) != list(answers):
        raise ArtefactError(
            "the suite draws another sample here than the stored one, so its distractors are not known",
            where=sample.sample_id,
            got=", ".join(draft.answers),
            expected=", ".join(answers),
            hint="Use the version of ctxext and the files that made the samples.",
        )
    return draft.distractors


def _put_beside(path: Path) -> Path:
    """Copy the samples to the first free name."""
    number = 1
    while (kept := path.with_name(f"{path.stem}.before-rescore-{number}.jsonl")).exists():
        number += 1
    write_bytes_atomic(kept, path.read_bytes())
    return kept


def _write_samples(path: Path, samples: Sequence[SampleResult]) -> None:
    write_bytes_atomic(path, "".join(f"{canonical_json(asdict(sample))}\n" for sample in samples).encode())
