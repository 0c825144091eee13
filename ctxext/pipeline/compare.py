"""`ctxext compare`: any evaluated arms side by side, on the prompts that they share.

Runs, folders of `ctxext eval`, recorded baselines and single folders of samples can stand beside each other. Only equal
prompts (equal token ids) are compared: another model's average over other prompts says nothing about the difference.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ctxext.errors import ArtefactError, CtxextError, UsageError
from ctxext.evaluation.arms import Arm, Coverage, arm_of_folder, compare_arms, coverage_of, without_controls
from ctxext.evaluation.cells import Over, length_label
from ctxext.evaluation.curves import accuracy_by_length
from ctxext.evaluation.heatmap import heatmap
from ctxext.evaluation.statistics import MeanScore, PairedComparison, counted, holm
from ctxext.evaluation.store import SampleResult, load_samples, score_of
from ctxext.files import read_json, write_bytes_atomic, write_json_atomic, write_text_atomic
from ctxext.pipeline.evaluate import gather_evaluation
from ctxext.pipeline.report import arms_of_run, recorded_arms
from ctxext.pipeline.run_folder import FACTS_NAME, RunFolder

_MAX_COLUMNS = 6


@dataclass(frozen=True)
class Entry:
    """One arm under a name of its own; `original_length` and `target_length` are None where nothing says them."""

    label: str
    arm: Arm
    original_length: int | None = None
    target_length: int | None = None

    @property
    def coverage(self) -> Coverage | None:
        """How far the arm was tested, beside its target length; None where no target is known."""
        if self.target_length is None:
            return None
        return coverage_of([self.arm], self.target_length, self.arm.answer_tokens)


@dataclass(frozen=True)
class PairTest:
    """Two entries on the prompts they share, at one place.

    Attributes:
        place: one length of one task; None for all prompts that the two share, those without a needle left out.
        p_adjusted: by Holm over the lengths of this pair; for all prompts together over the arms compared.
        num_tests: how many p values were adjusted together.
    """

    first: str
    second: str
    place: tuple[str, int] | None
    comparison: PairedComparison
    p_adjusted: float
    num_tests: int = 1

    @property
    def verdict(self) -> str:
        """In words."""
        return replace(self.comparison, p_value=self.p_adjusted).verdict(self.first, self.second)

    @property
    def brief(self) -> str:
        """The first entry's outcome in a few words."""
        pair = replace(self.comparison, p_value=self.p_adjusted)
        if pair.better:
            return f"{'better' if pair.better == 'first' else 'worse'} (p = {pair.p_value:.3g})"
        if pair.only_first == pair.only_second == 0:
            return "alike"
        return "no difference shown" if pair.decidable else "not decided, too few differ"


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown.

    Attributes:
        common: hashes of the prompts that every entry has a score for.
        scores: per task and length, every entry's score on the common prompts (on its own ones when none is common).
        notes: which prompts are not shared, and whatever else limits the comparison.
    """

    entries: list[Entry]
    common: set[str]
    scores: dict[tuple[str, int], list[MeanScore | None]]
    tests: list[PairTest]
    notes: list[str]


def load_entries(names: Sequence[str]) -> list[Entry]:
    """The arms behind run folders, evaluation folders, baselines (by name or folder) and folders of samples.

    `NAME:ARM` takes one arm of several.

    Raises:
        UsageError: no such folder or baseline, no such arm, or fewer than two arms altogether.
        ArtefactError: a folder without samples.
    """
    entries: list[Entry] = []
    for name in names:
        found = _entries_of(name)
        taken = {entry.label for entry in entries}
        # Two folders of one name are told apart by the path that the user typed.
        entries += [replace(e, label=f"{name.rstrip('/')}:{e.arm.name}") if e.label in taken else e for e in found]
    if len(entries) < 2:
        raise UsageError(
            "nothing to compare with",
            where=" ".join(names),
            got=counted(len(entries), "evaluated arm"),
            expected="two or more",
            hint="Name two runs, or a run and a recorded baseline.",
        )
    return entries


def compare(entries: Sequence[Entry]) -> Comparison:
    """Every entry on the common prompts, and each one against the first. Pure."""
    scored = [{sample.prompt_sha256 for sample in entry.arm.scored} for entry in entries]
    common = set.intersection(*scored)
    places = sorted({(s.task, s.length_tokens) for e in entries for s in _shown(e, common)})
    scores = {
        (task, length): [
            score_of(s for s in _shown(entry, common) if (s.task, s.length_tokens) == (task, length))
            for entry in entries
        ]
        for task, length in places
    }
    tests = _adjusted([test for entry in entries[1:] for test in _tests(entry, entries[0])])
    return Comparison(list(entries), common, scores, tests, _notes(entries, common))


def comparison_table(comparison: Comparison) -> tuple[Table, list[str]]:
    """What the terminal shows: a table, then verdicts and limits."""
    tasks = {task for task, _ in comparison.scores}
    basis = counted(len(comparison.common), "common prompt") if comparison.common else "each arm's own prompts"
    title = f"Share of right answers by length ({basis})"
    limit = _limit(comparison.entries)
    if limit is not None and not limit.reached:
        title += f"; tested up to {limit.longest_tokens:,} of {limit.target_length:,} tokens"
    table = Table(title=title, title_justify="left", min_width=min(len(title), 78))
    places = [f"{task} {length_label(n)}" if len(tasks) > 1 else length_label(n) for task, n in comparison.scores]
    labels = [escape(entry.label) for entry in comparison.entries]
    cells = [[_cell(score) for score in scores] for scores in comparison.scores.values()]
    if len(places) > _MAX_COLUMNS:
        rows, columns, corner = list(zip(places, cells, strict=True)), labels, "length"
    else:
        turned = [list(column) for column in zip(*cells, strict=True)]
        rows, columns, corner = list(zip(labels, turned, strict=True)), places, "arm"
    table.add_column(corner, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for name, row in rows:
        table.add_row(name, *row)
    return table, [*_test_lines(comparison.tests), *comparison.notes]


def comparison_numbers(comparison: Comparison) -> dict[str, Any]:
    """The comparison for programs."""
    return {
        "arms": [
            {
                "label": entry.label,
                "arm": entry.arm.name,
                "recorded": entry.arm.recorded,
                "identity_hash": entry.arm.run.get("identity_hash"),
                "original_length": entry.original_length,
                "target_length": entry.target_length,
                "num_scored": len(entry.arm.scored),
                "longest_tested": entry.coverage.longest_tokens if entry.coverage else None,
                "target_reached": entry.coverage.reached if entry.coverage else None,
            }
            for entry in comparison.entries
        ],
        "num_common_prompts": len(comparison.common),
        "scores": [
            {"task": task, "length_tokens": length, "label": entry.label, **_score_numbers(score)}
            for (task, length), scores in comparison.scores.items()
            for entry, score in zip(comparison.entries, scores, strict=True)
        ],
        "tests": [
            {
                "first": test.first,
                "second": test.second,
                "task": test.place[0] if test.place else None,
                "length_tokens": test.place[1] if test.place else None,
                "verdict": test.verdict,
                "test": test.comparison.test,
                "num_pairs": test.comparison.num_pairs,
                "num_independent": test.comparison.num_units,
                "both": test.comparison.both,
                "only_first": test.comparison.only_first,
                "only_second": test.comparison.only_second,
                "neither": test.comparison.neither,
                "p_value": test.comparison.p_value,
                "p_adjusted": test.p_adjusted,
                "num_tests": test.num_tests,
            }
            for test in comparison.tests
        ],
        "notes": comparison.notes,
    }


def comparison_csv(comparison: Comparison) -> str:
    """One line a task, length and arm."""
    stream = io.StringIO()
    columns = "task length_tokens label num_samples num_haystacks score low high longest_tested target_length".split()
    limits = {entry.label: entry.coverage for entry in comparison.entries}
    writer = csv.DictWriter(stream, columns, lineterminator="\n", restval="")
    writer.writeheader()
    for row in comparison_numbers(comparison)["scores"]:
        low, high = row.pop("interval_95", ["", ""])
        limit = limits[row["label"]]
        known = {"longest_tested": limit.longest_tokens, "target_length": limit.target_length} if limit else {}
        writer.writerow({**row, "low": low, "high": high, **known})
    return stream.getvalue()


def write_comparison(folder: Path, comparison: Comparison) -> list[Path]:
    """Write `comparison.json`, `comparison.csv` and, where the lengths are known, pictures; returns the files.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    files = [folder / "comparison.json", folder / "comparison.csv"]
    write_json_atomic(files[0], comparison_numbers(comparison))
    write_text_atomic(files[1], comparison_csv(comparison))
    original = max((e.original_length for e in comparison.entries if e.original_length), default=None)
    target = max((e.target_length for e in comparison.entries if e.target_length), default=None)
    if original and target:
        arms = [
            replace(e.arm, name=e.label, label=e.label, recorded=False, samples=_shown(e, comparison.common))
            for e in comparison.entries
        ]
        limit = _limit(comparison.entries)
        lengths: Any = {
            "original_length": original,
            "target_length": target,
            "footnote": limit.footnote if limit else None,
        }
        over: Over = "task" if len({task for task, _ in comparison.scores}) > 1 else "depth"
        for stem, picture in (
            ("accuracy_by_length", accuracy_by_length([without_controls(arm) for arm in arms], **lengths)),
            ("heatmaps", heatmap(arms, **lengths, over=over)),
        ):
            for suffix, data in (("png", picture.png), ("svg", picture.svg)):
                files.append(folder / f"{stem}.{suffix}")
                write_bytes_atomic(files[-1], data)
    return files


def print_comparison(console: Console, names: Sequence[str], output: Path | None) -> None:
    """Compare the arms behind `names`, print table and verdicts, and write the files when a folder is given.

    Raises:
        CtxextError: see `load_entries` and `write_comparison`.
    """
    comparison = compare(load_entries(names))
    table, lines = comparison_table(comparison)
    console.print(table)
    for line in lines:
        console.print(line, markup=False)
    for file in write_comparison(output, comparison) if output else []:
        console.print(f"Written: {file}", markup=False, soft_wrap=True)


def _entries_of(name: str) -> list[Entry]:
    path = Path(name)
    if not path.is_dir() and ":" in name:
        rest, _, wanted = name.rpartition(":")
        found = [entry for entry in _entries_of(rest) if entry.arm.name == wanted]
        if not found:
            known = ", ".join(entry.arm.name for entry in _entries_of(rest))
            raise UsageError("no such arm", where=rest, got=wanted, expected=f"one of {known}")
        return found
    if not path.is_dir():
        return _baseline(name)
    arms, lengths = _arms_in(path)
    if not any(arm.scored for arm in arms):
        raise ArtefactError(
            "no evaluated samples here",
            where=name,
            expected="a run folder, a folder of `ctxext eval`, a baseline or a folder with samples.jsonl",
        )
    stem = path.resolve().name
    return [Entry(f"{stem}:{arm.name}" if len(arms) > 1 else stem, arm, *lengths) for arm in arms if arm.scored]


def _baseline(name: str) -> list[Entry]:
    try:
        arms, facts = recorded_arms(name)
    except CtxextError as error:
        raise UsageError(
            "neither a folder nor a recorded baseline",
            where=name,
            expected=f"a run, a folder of `ctxext eval`, or {error.expected}",
        ) from error
    return [Entry(f"{name}:{arm.name}", arm, facts["original_length"], facts["target_length"]) for arm in arms]


def _arms_in(path: Path) -> tuple[list[Arm], tuple[int | None, int | None]]:
    """Arms of a folder of any kind, with original and target length."""
    if (path / "baseline.json").is_file():
        facts = read_json(path / "baseline.json")
        folders = sorted(path.glob("*/samples.jsonl"))
        return [_arm(f.parent, recorded=True) for f in folders], (facts["original_length"], facts["target_length"])
    if (path / "recipe.yaml").is_file():
        run = RunFolder(path)
        plan = read_json(path / "plan.json")
        return arms_of_run(run, run.recipe().rope.method), (plan["original_length"], plan["target_length"])
    if (path / FACTS_NAME).is_file():
        about, arms = gather_evaluation(path)
        return arms, (about.original_length, about.target_length)
    if (path / "samples.jsonl").is_file():
        return [_arm(path, recorded=False)], (None, None)
    return [], (None, None)


def _arm(folder: Path, *, recorded: bool) -> Arm:
    name = arm_of_folder(folder.name)
    header = folder / "run.json"
    run = read_json(header) if header.is_file() else {}
    return Arm(name, name, recorded=recorded, samples=load_samples(folder), run=run)


def _shown(entry: Entry, common: set[str]) -> list[SampleResult]:
    return [s for s in entry.arm.scored if s.prompt_sha256 in common] if common else entry.arm.scored


def _tests(entry: Entry, reference: Entry) -> list[PairTest]:
    """All shared prompts together, then each task and length by itself."""
    mine, theirs = without_controls(entry.arm), without_controls(reference.arm)
    whole = compare_arms(mine, theirs)
    if whole is None:
        return []
    tests = [PairTest(entry.label, reference.label, None, whole, whole.p_value)]
    places = sorted({(s.task, s.length_tokens) for s, _ in mine.pairs_with(theirs)})
    if len(places) < 2:
        return tests
    parts = []
    for place in places:
        part = compare_arms(mine, theirs, lambda s, place=place: (s.task, s.length_tokens) == place)  # type: ignore[misc]
        if part is not None:
            parts.append((place, part))
    adjusted = holm([part.p_value for _, part in parts])
    return tests + [
        PairTest(entry.label, reference.label, place, part, p_value, len(parts))
        for (place, part), p_value in zip(parts, adjusted, strict=True)
    ]


def _adjusted(tests: list[PairTest]) -> list[PairTest]:
    """The tests over all prompts adjusted for each other: several arms are compared with the first."""
    wholes = [test for test in tests if test.place is None]
    p_values = iter(holm([test.comparison.p_value for test in wholes]))
    return [
        replace(test, p_adjusted=next(p_values), num_tests=len(wholes)) if test.place is None else test
        for test in tests
    ]


def _limit(entries: Sequence[Entry]) -> Coverage | None:
    """How far the tests of all entries reach together, beside the longest target length."""
    target = max((entry.target_length for entry in entries if entry.target_length), default=None)
    if target is None:
        return None
    arms = [entry.arm for entry in entries]
    return coverage_of(arms, target, max(arm.answer_tokens for arm in arms))


def _test_lines(tests: Sequence[PairTest]) -> list[str]:
    """One line a pair for all their prompts, and one for what each length says."""
    lines = []
    for whole in (test for test in tests if test.place is None):
        pair = whole.comparison
        named = "" if whole.first in whole.verdict else f"{whole.first} against {whole.second}: "
        units = f" of {counted(pair.num_units, 'haystack')}" if pair.num_units < pair.num_pairs else ""
        lines.append(
            f"{named}{whole.verdict}: {pair.first.text()} against {pair.second.text()} on "
            f"{counted(pair.num_pairs, 'prompt')}{units}, {pair.only_first} only the first and {pair.only_second} only "
            f"the second, {pair.test} test"
            f"{f', p adjusted for {whole.num_tests} comparisons' if whole.num_tests > 1 else ''}."
        )
        parts = [t for t in tests if t.place and (t.first, t.second) == (whole.first, whole.second)]
        several = len({part.place[0] for part in parts if part.place}) > 1
        texts = [
            f"{f'{part.place[0]} ' if several else ''}{part.place[1]:,} {part.brief}" for part in parts if part.place
        ]
        if texts:
            lines.append(f"  {whole.first} by length, p adjusted for {len(texts)} comparisons: {'; '.join(texts)}.")
    return lines


def _notes(entries: Sequence[Entry], common: set[str]) -> list[str]:
    notes = []
    if not common:
        notes.append(
            "No prompt is common to all arms, so the rows of the table rest on different prompts and must not be "
            "compared; other tokenizers, seeds, haystacks or lengths make other prompts."
        )
    for entry in entries:
        alone = [s for s in entry.arm.scored if s.prompt_sha256 not in common]
        if alone and common:
            lengths = Counter(s.length_tokens for s in alone)
            places = ", ".join(f"{count} at {length:,}" for length, count in sorted(lengths.items()))
            notes.append(
                f"{entry.label}: {len(alone)} of {counted(len(entry.arm.scored), 'scored prompt')} are not shared by "
                f"all and left out of the table ({places} tokens)."
            )
        missing = len(entry.arm.samples) - len(entry.arm.scored)
        if missing:
            notes.append(f"{entry.label}: {counted(missing, 'prompt')} without a score.")
    for entry in entries:
        if entry.coverage is not None and entry.coverage.sentence:
            notes.append(f"{entry.label}: {entry.coverage.sentence}")
    if any(arm.is_saliency(task) for arm in (entry.arm for entry in entries) for task in arm.tasks):
        notes.append("Some texts are repeated noise: those prompts test saliency, not retrieval.")
    metrics = {s.metric for entry in entries for s in entry.arm.scored if s.metric}
    by_entry = {frozenset(s.metric for s in entry.arm.scored if s.metric) for entry in entries}
    if len(by_entry) > 1:
        notes.append(f"The arms were not scored by the same metrics ({', '.join(sorted(metrics))}).")
    originals = sorted({entry.original_length for entry in entries if entry.original_length})
    if len(originals) > 1:
        notes.append(f"The arms have different original lengths ({', '.join(f'{n:,}' for n in originals)} tokens).")
    return notes


def _cell(score: MeanScore | None) -> str:
    if score is None:
        return "-"
    ends = "-".join(f"{end:.2f}".removeprefix("0") for end in (score.low, score.high))
    clusters = f"\n{counted(score.num_clusters, 'haystack')}" if score.num_clusters < score.num_samples else ""
    return f"{score.value:.2f} of {score.num_samples}\n{ends}{clusters}"


def _score_numbers(score: MeanScore | None) -> dict[str, Any]:
    if score is None:
        return {"num_samples": 0}
    return {
        "num_samples": score.num_samples,
        "num_haystacks": score.num_clusters,
        "score": score.value,
        "interval_95": [score.low, score.high],
    }
