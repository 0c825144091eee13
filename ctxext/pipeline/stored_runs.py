"""Stored evaluations without their models: score them again, rebuild a prompt, check them, derive what is derived.

A stored evaluation is a folder of `ctxext eval`, a run folder with all its arms, a recorded baseline or a copy of one,
or a single folder with `samples.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ctxext.errors import ArtefactError, CtxextError, UsageError, unknown_name
from ctxext.evaluation.arms import arm_of_folder
from ctxext.evaluation.prompt import suite_builder
from ctxext.evaluation.reconstruct import Builder, describe, find_sample, printable, reconstruct
from ctxext.evaluation.rescore import rescore_folder
from ctxext.evaluation.results import write_results
from ctxext.evaluation.ruler_file import RulerBuilder, line_samples, reread_ruler_file
from ctxext.evaluation.scoring import METRICS
from ctxext.evaluation.store import RUN_NAME, SAMPLES_NAME, load_samples, sample_files
from ctxext.evaluation.suite import Sample, Suite, resolve_samples, stored_suite
from ctxext.evaluation.validate import Expectations, Problem, validate_folder
from ctxext.files import read_json
from ctxext.model.load import load_tokenizer, resolve_source
from ctxext.pipeline.baselines import baseline_folder
from ctxext.pipeline.run_folder import FACTS_NAME

_MOST_SHOWN = 40


class Lines(Protocol):
    """Shows lines to people."""

    def info(self, text: str) -> None:
        """One line."""


@dataclass(frozen=True)
class _Origin:
    """What a folder says about the arms below it: the suite with the name it was asked for, lengths, sample ids."""

    suite: dict[str, Any] | None = None
    original_length: int | None = None
    target_length: int | None = None
    sample_ids: frozenset[str] | None = None


@dataclass(frozen=True)
class StoredArm:
    """One arm's samples on disk.

    Attributes:
        name: of the arm, or of its folder.
        run: its `run.json`.
        suite: None where nothing says which it was.
        wanted: the samples that belong here; None likewise.
    """

    name: str
    folder: Path
    run: dict[str, Any]
    suite: Suite | None
    wanted: list[Sample] | None

    def tokenizer(self, name: str | None) -> Any:
        """The tokenizer that the prompts were made with.

        Args:
            name: a model to take it from instead of the stored source.

        Raises:
            ArtefactError: not to be found.
        """
        source = name or self.run.get("identity", {}).get("weights", {}).get("source")
        hint = "Give --tokenizer MODEL, any model with the same tokenizer."
        if not source:
            raise ArtefactError("nothing says which model was evaluated", where=str(self.folder), hint=hint)
        try:
            return load_tokenizer(resolve_source(source))
        except CtxextError as error:
            raise ArtefactError(f"no tokenizer ({error})", where=str(self.folder), hint=hint) from error

    def builder(self, tokenizer: Any) -> Builder:
        """What makes the prompts again.

        Raises:
            ArtefactError: nothing says which suite it was, or RULER's files are not there any more.
        """
        if "ruler_files" in self.run:
            return RulerBuilder(tokenizer, [reread_ruler_file(about) for about in self.run["ruler_files"]])
        if self.suite is None:
            raise ArtefactError(
                "nothing here says which suite was asked",
                where=str(self.folder),
                hint="Name the whole run or evaluation folder instead of a part of it.",
            )
        return suite_builder(self.suite, tokenizer)


def stored_arms(name: str) -> list[StoredArm]:
    """The arms behind a folder or the name of a recorded baseline.

    Raises:
        UsageError: neither.
        ArtefactError: a folder without samples.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _baseline(name)
    found = list(_arms_below(folder, _Origin(), deep=2))
    if not found:
        raise ArtefactError(
            "no evaluated samples here",
            where=name,
            expected="a run folder, a folder of `ctxext eval`, a baseline or a folder with samples.jsonl",
        )
    return found


def stored_command(
    words: Sequence[str],
    reporter: Lines,
    *,
    rescore: str | None = None,
    reconstruct: str | None = None,
    validate: str | None = None,
    metric: str | None = None,
    tokenizer: str | None = None,
    full: bool = False,
    every_prompt: bool = False,
) -> bool:
    """What `ctxext eval` does without a model when one of its three options names a run; false when none does.

    Args:
        words: what the command line has besides options.

    Raises:
        CtxextError: several at once, an option of another one, or what the three themselves raise.
    """
    asked = {"--rescore": rescore, "--reconstruct": reconstruct, "--validate": validate}
    given = [name for name, run in asked.items() if run is not None]
    mine = {"--metric": (metric, "--rescore"), "--full": (full, "--reconstruct"), "--all": (every_prompt, "--validate")}
    for option, (value, owner) in mine.items():
        if value and given != [owner]:
            raise UsageError(f"{option} belongs to {owner} RUN", where="command line")
    if tokenizer and given not in (["--reconstruct"], ["--validate"]):
        raise UsageError("--tokenizer belongs to --reconstruct RUN or --validate RUN", where="command line")
    if len(given) > 1:
        raise UsageError("these do different things; give one", where="command line", got=" and ".join(given))
    if not given:
        return False
    expected = 1 if reconstruct else 0
    if len(words) != expected:
        raise UsageError(
            f"{given[0]} takes a run{' and one sample' if expected else ', and no model'}",
            where="command line",
            got=" ".join(words) or "no sample",
            expected=f"ctxext eval {given[0]} RUN{' SAMPLE' if expected else ''}",
        )
    if rescore:
        rescore_run(rescore, metric, reporter)
    elif reconstruct:
        reconstruct_run(reconstruct, words[0], reporter, full=full, tokenizer=tokenizer)
    elif validate:
        validate_run(validate, reporter, every_prompt=every_prompt, tokenizer=tokenizer)
    return True


def rescore_run(name: str, metric: str | None, reporter: Lines) -> None:
    """Score the stored answers of every arm anew and tell what changed.

    Raises:
        UsageError: unknown metric; a recorded baseline by name, which is not to be changed.
        ArtefactError: see `rescore_folder`.
    """
    if not Path(name).is_dir():
        _baseline(name)
        raise UsageError(
            "a recorded baseline that ships with ctxext is not changed",
            where=name,
            hint="Copy its folder and score the copy.",
        )
    if metric is not None and metric not in METRICS:
        raise unknown_name("metric", metric, METRICS, where="--metric")
    for arm in stored_arms(name):
        done = rescore_folder(arm.folder, arm.suite, metric)
        reporter.info(f"{arm.name}: {done.summary()}")
        for old, new in done.flipped[:_MOST_SHOWN]:
            became = "right" if new.score >= 1.0 else "wrong"
            reporter.info(
                f"  {new.sample_id} is {became} now: expected '{printable(new.expected)}', "
                f"answered {printable(new.answer)!r} ({old.score:g} before, {new.score:g} now)"
            )
        if len(done.flipped) > _MOST_SHOWN:
            reporter.info(f"  and {len(done.flipped) - _MOST_SHOWN} more")
        if done.kept:
            reporter.info(f"  the old samples: {done.kept}")
    reporter.info(f"`ctxext report {name}` draws tables and pictures anew")


def reconstruct_run(
    name: str, wanted: str, reporter: Lines, *, full: bool = False, tokenizer: str | None = None
) -> None:
    """Show the exact prompt of a stored sample, after its hash has been proven.

    Args:
        wanted: an id, a part that only one id has, `worst`; `ARM:...` for one arm of several.

    Raises:
        UsageError: no such sample.
        ArtefactError: the prompt that is made today is another one, with what differs.
    """
    arm, wanted = _chosen(stored_arms(name), wanted)
    sample = find_sample(load_samples(arm.folder), wanted)
    ids = arm.tokenizer(tokenizer)
    made = reconstruct(arm.builder(ids), sample, arm.suite, arm.run)
    reporter.info(f"arm       {arm.name}")
    for line in describe(made, ids, full=full):
        reporter.info(line)


def validate_run(name: str, reporter: Lines, *, every_prompt: bool = False, tokenizer: str | None = None) -> None:
    """Check every arm of a stored evaluation.

    Raises:
        ArtefactError: something is wrong; all of it was told before.
    """
    problems: list[Problem] = []
    for arm in stored_arms(name):
        found = validate_folder(arm.folder, _expectations(arm, tokenizer, reporter), every_prompt=every_prompt)
        problems += found.problems
        reporter.info(f"{arm.name}: {found.summary()}")
        for note in found.notes:
            reporter.info(f"  note: {note}")
        for problem in found.problems[:_MOST_SHOWN]:
            reporter.info(f"  {problem.text()}")
        if len(found.problems) > _MOST_SHOWN:
            reporter.info(f"  and {len(found.problems) - _MOST_SHOWN} more")
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ArtefactError(f"the stored evaluation is not in order: {count}", where=name, got=problems[0].text())


def derive_results(name: str) -> list[Path]:
    """Write every arm's `results.json` anew from its samples, and return the folders.

    Raises:
        UsageError, ArtefactError: no samples there.
    """
    folders = []
    for arm in stored_arms(name):
        write_results(arm.folder, suite=arm.suite.model_dump(mode="json") if arm.suite else None)
        folders.append(arm.folder)
    return folders


def _expectations(arm: StoredArm, tokenizer: str | None, reporter: Lines) -> Expectations:
    """What can be checked here: without tokenizer or haystack no prompts are made again."""
    try:
        ids = arm.tokenizer(tokenizer)
    except ArtefactError as error:
        if tokenizer is not None:
            raise
        reporter.info(f"  note: {error}")
        return Expectations(arm.suite, arm.wanted)

    def decode(tokens: list[int]) -> str:
        return str(ids.decode(tokens, skip_special_tokens=True))

    try:
        builder = arm.builder(ids)
    except CtxextError as error:
        reporter.info(f"  note: {error}")
        return Expectations(arm.suite, arm.wanted, decode=decode)
    return Expectations(arm.suite, arm.wanted, builder, decode)


def _chosen(arms: list[StoredArm], wanted: str) -> tuple[StoredArm, str]:
    """The arm that a sample is asked of: the named one, else the last, which is what the evaluation was made for."""
    prefix, mark, rest = wanted.partition(":")
    for arm in arms:
        if mark and arm.name == prefix:
            return arm, rest
    if mark:
        names = ", ".join(arm.name for arm in arms)
        raise UsageError("no such arm", where="SAMPLE", got=prefix, expected=f"one of {names}")
    named = {arm.name: arm for arm in arms}
    return named.get("extended", arms[-1]), wanted


def _arms_below(folder: Path, known: _Origin, deep: int) -> Iterator[StoredArm]:
    """Arms in a folder or up to `deep` levels below it."""
    known = _origin(folder) or known
    if sample_files(folder):
        yield _arm(folder, known if known != _Origin() else _origin_above(folder))
        return
    if deep:
        for below in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
            yield from _arms_below(below, known, deep - 1)


def _arm(folder: Path, known: _Origin) -> StoredArm:
    header = folder / RUN_NAME
    run = _read(header) if header.is_file() else {}
    name = arm_of_folder(folder.name)
    if "ruler_files" in run:
        lines = [line_samples(f["task"], f["length_tokens"], f["num_samples"]) for f in run["ruler_files"]]
        return StoredArm(name, folder, run, None, [sample for file in lines for sample in file])
    values = run.get("suite") or known.suite
    suite = stored_suite(values) if values and "grid" in values else None
    original = run.get("original_length") or known.original_length
    target = run.get("target_length") or known.target_length
    wanted = None
    if suite is not None and original and target:
        wanted = resolve_samples(suite, original, target)
        if known.sample_ids is not None:
            wanted = [sample for sample in wanted if sample.sample_id in known.sample_ids]
    return StoredArm(name, folder, run, suite, wanted)


def _origin(folder: Path) -> _Origin | None:
    """What the files of `ctxext eval`, of a run or of a baseline say; None where there are none."""
    if (folder / FACTS_NAME).is_file():
        facts = _read(folder / FACTS_NAME)
        ids = facts.get("samples")
        return _Origin(
            facts["suite"], facts["original_length"], facts["target_length"], frozenset(ids) if ids else None
        )
    if (folder / "plan.json").is_file():
        plan = _read(folder / "plan.json")
        return _Origin(plan["suite"], plan["original_length"], plan["target_length"])
    if (folder / "baseline.json").is_file() and (folder / "summary.json").is_file():
        facts = _read(folder / "summary.json")["facts"]
        return _Origin(facts["suite"], facts["original_length"], facts["target_length"])
    return None


def _origin_above(folder: Path) -> _Origin:
    """For one arm of a run, an evaluation or a baseline, named by itself."""
    for above in list(folder.resolve().parents)[:2]:
        if origin := _origin(above):
            return origin
    return _Origin()


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(path)
    return values


def _baseline(name: str) -> Path:
    try:
        return baseline_folder(name)
    except CtxextError as error:
        raise UsageError(
            "neither a folder nor a recorded baseline",
            where=name,
            expected=f"a run, a folder of `ctxext eval` with {SAMPLES_NAME}, or {error.expected}",
        ) from error
