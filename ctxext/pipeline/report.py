"""Everything a report shows, gathered from a run folder alone; and recorded runs to stand beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ctxext.errors import ArtefactError
from ctxext.evaluation.cells import Over
from ctxext.evaluation.conclusions import Arm, ArmName
from ctxext.evaluation.haystack import HaystackChoice, load_haystack
from ctxext.evaluation.perplexity import load_perplexity
from ctxext.evaluation.report import ReportFacts, write_report
from ctxext.evaluation.store import load_samples
from ctxext.evaluation.suite import stored_suite
from ctxext.evaluation.training_view import TrainingRecord
from ctxext.files import directory_atomic, read_json, write_json_atomic
from ctxext.model.load import short_name
from ctxext.pipeline.baselines import baseline_folder
from ctxext.pipeline.excerpts import read_excerpts
from ctxext.pipeline.run_folder import RunFolder
from ctxext.pipeline.training_data import report_notes
from ctxext.recipe.schema import Recipe
from ctxext.train.adapter import PROVENANCE_NAME, read_provenance
from ctxext.train.inexact import records, sentences, trained_inexactly
from ctxext.train.metrics import read_metrics
from ctxext.train.periodic import CHECKPOINT

_ORDER: tuple[ArmName, ...] = ("base", "untrained", "control", "extended")


def arm_labels(method: str) -> dict[str, str]:
    """What each arm is called in pictures and sentences."""
    return {
        "base": "base model",
        "untrained": f"{method}, untrained",
        "text-alone": f"{method}, trained on text alone",
        "control": "control: same training, no rewrite",
        "extended": f"{method}, trained",
    }


def arms_of_run(run: RunFolder, method: str) -> list[Arm]:
    """The arms that a run has evaluated."""
    labels = arm_labels(method)
    arms = []
    for name in _ORDER:
        folder = run.evaluation(name)
        samples = load_samples(folder)
        if samples:
            arms.append(
                Arm(name=name, label=labels[name], recorded=False, samples=samples, run=read_json(folder / "run.json"))
            )
    return arms


def recorded_arms(name: str) -> tuple[list[Arm], dict[str, Any]]:
    """The arms and facts of a baseline that ships with ctxext.

    Raises:
        UsageError: no such baseline.
    """
    return _arms_in_baseline(baseline_folder(name))


def _arms_in_baseline(folder: Path) -> tuple[list[Arm], dict[str, Any]]:
    facts = read_json(folder / "baseline.json")
    labels = arm_labels(facts["method"])
    found = [path.parent.name for path in sorted(folder.glob("*/samples.jsonl"))]
    names = [name for name in _ORDER if name in found] + [name for name in found if name not in _ORDER]
    arms = [
        Arm(
            name=arm,
            label=labels.get(arm, arm),
            recorded=True,
            samples=load_samples(folder / arm),
            run=read_json(folder / arm / "run.json"),
        )
        for arm in names
    ]
    return arms, facts


def report_run(run: RunFolder, over: Over = "depth") -> Path:
    """Draw everything again from the samples and return the page.

    Raises:
        ArtefactError: no run here, or nothing evaluated yet.
    """
    recipe = run.recipe()
    facts, arms = gather(run, recipe)
    if not any(not arm.recorded for arm in arms):
        raise ArtefactError("nothing has been evaluated in this run yet", where=str(run.path))
    perplexity = stored_perplexity({arm.name: run.evaluation(arm.name) for arm in arms if not arm.recorded})
    return write_report(
        run.report,
        facts,
        arms,
        excerpts=read_excerpts(run.path / "eval"),
        perplexity=perplexity,
        over=over,
        training=training_record(run.path, run.trained),
    )


def training_record(folder: Path, trained: Path | None) -> TrainingRecord:
    """The lines that one arm's training wrote into `folder`, and which of its checkpoints it ended with."""
    steps, monitors = read_metrics(folder)
    checkpoint = None if trained is None else read_provenance(trained).get(CHECKPOINT)
    return TrainingRecord(steps, monitors, checkpoint)


def self_check_notes(folders: Mapping[str, Path]) -> list[str]:
    """What must stand beside the numbers of arms whose self-check failed; folders of samples by the arms' names."""
    notes = []
    for name, folder in folders.items():
        path = folder / "engine.json"
        check = read_json(path).get("self_check") if path.is_file() else None
        if check and check["outcome"] == "different":
            notes.append(
                f"Arm {name}: the engine's answer to {check['sample_id']} is not what plain generate answers; these "
                "results must not be relied on. Please report it."
            )
    return notes


def stored_perplexity(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The first perplexity that each arm's folder holds, by the arm's name; arms without one are left out."""
    results = {name: load_perplexity(folder) for name, folder in folders.items()}
    return {name: asdict(found[0]) for name, found in results.items() if found}


def gather(run: RunFolder, recipe: Recipe) -> tuple[ReportFacts, list[Arm]]:
    """Facts and arms of a run, recorded arms included."""
    plan = read_json(run.path / "plan.json")
    arms = arms_of_run(run, recipe.rope.method)
    notes = [*self_check_notes({arm.name: run.evaluation(arm.name) for arm in arms}), *_inexact_notes(run)]
    if recipe.evaluation.recorded:
        recorded, baseline = recorded_arms(recipe.evaluation.recorded)
        arms += recorded
        notes.append(_recorded_note(recipe.evaluation.recorded, baseline))
    if recipe.data.facts and recipe.data.facts.style == "passkey":
        notes.append(
            "Training used the evaluation's own wording and kind of text: this run demonstrates the method on a tiny "
            "model, it does not measure generalisation."
        )
    if (run.path / "data.json").is_file():
        notes += report_notes(read_json(run.path / "data.json"))
    windows = (
        f"{plan['window_mode']} windows of {plan['window_tokens']} tokens, {plan['windows_per_step']} a step, "
        f"{plan['steps']} steps"
    )
    facts = ReportFacts(
        title=f"{short_name(plan['model'])}: {plan['original_length']} to {plan['target_length']} tokens",
        model=plan["model"],
        method=f"{recipe.rope.method}, factor {plan['factor']:g}",
        original_length=plan["original_length"],
        target_length=plan["target_length"],
        windows=windows,
        suite=plan["suite"],
        plan_id=plan["plan_id"],
        model_description=recipe.model.description,
        facts_share=plan["facts_share"] or None,
        facts_style=recipe.data.facts.style if recipe.data.facts else None,
        seconds=run.status()["stages"],
        environment=read_json(run.path / "environment.json"),
        notes=notes,
        target_reached=True if run.trained is not None else None,
    )
    return facts, arms


def _inexact_notes(run: RunFolder) -> list[str]:
    """What the checkpoint says of its own training and of the stages before; without one, what the run folder says."""
    provenance = run.merged / PROVENANCE_NAME
    return trained_inexactly(read_json(provenance)) if provenance.is_file() else sentences(records(run.path))


def _recorded_note(name: str, baseline: dict[str, Any]) -> str:
    note = (
        f"Recorded arms: {name}, made on {baseline['hardware']} with Python {baseline['python']} by "
        f"`{baseline['command']}`; they were not run on this machine."
    )
    choice: HaystackChoice = TypeAdapter(HaystackChoice).validate_python(baseline["haystack"])
    haystack = load_haystack(choice)
    if haystack.sha256 != baseline["haystack_sha256"]:
        note += (
            " This Python's documentation differs from the recorded haystack, so the recorded prompts are not the ones "
            "of this run."
        )
    return note


def record_baseline(run: RunFolder, destination: Path, *, command: str, hardware: str) -> Path:
    """Copy a run's samples, results and heatmaps into a baseline folder.

    Raises:
        ArtefactError: the destination exists, or nothing was evaluated.
    """
    recipe = run.recipe()
    arms = arms_of_run(run, recipe.rope.method)
    if not arms:
        raise ArtefactError("nothing has been evaluated in this run yet", where=str(run.path))
    plan, environment = read_json(run.path / "plan.json"), read_json(run.path / "environment.json")
    choice = stored_suite(plan["suite"]).haystack
    haystack = load_haystack(choice)
    with directory_atomic(destination) as partial:
        for arm in arms:
            source = run.evaluation(arm.name)
            (partial / arm.name).mkdir()
            for name in ("run.json", "samples.jsonl", "results.json"):
                shutil.copyfile(source / name, partial / arm.name / name)
        shutil.copyfile(run.path / "recipe.yaml", partial / "recipe.yaml")
        facts, _ = gather(run, recipe)
        _draw_baseline(partial, replace(facts, notes=[]), arms)
        write_json_atomic(
            partial / "baseline.json",
            {
                "command": command,
                "hardware": hardware,
                "python": environment["python"],
                "packages": environment["packages"],
                "method": recipe.rope.method,
                "plan_id": plan["plan_id"],
                "original_length": plan["original_length"],
                "target_length": plan["target_length"],
                "haystack": choice if isinstance(choice, str) else choice.model_dump(mode="json"),
                "haystack_sha256": haystack.sha256,
                "seconds": run.status()["stages"],
            },
        )
    return destination


def report_baseline(folder: Path) -> Path:
    """Draw the pictures and tables of a baseline folder again, from the samples of all arms in it.

    Raises:
        ArtefactError: no baseline, or a damaged one.
    """
    arms, _ = _arms_in_baseline(folder)
    facts = ReportFacts(**read_json(folder / "summary.json")["facts"])
    _draw_baseline(folder, facts, [replace(arm, recorded=False) for arm in arms])
    return folder


def _draw_baseline(folder: Path, facts: ReportFacts, arms: list[Arm]) -> None:
    """Everything of a report but the page; a baseline is shown on the pages of runs."""
    write_report(folder / "report", facts, arms).unlink()
    for picture in (folder / "report").iterdir():
        picture.rename(folder / picture.name)
    (folder / "report").rmdir()
