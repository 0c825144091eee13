"""Resuming with other settings: refused with a table of what differs, or recorded for everything made afterwards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxext.errors import ResumeError
from ctxext.files import read_json, write_json_atomic
from ctxext.recipe.effects import Difference, differences, table

INEXACT_NAME = "inexact.json"


def check_same_run(
    stored: Mapping[str, Any], plan: Mapping[str, Any], folder: Path, *, finished: bool, allowed: bool
) -> None:
    """Refuse to go on in a run folder with other settings than those its training began with.

    Where nothing has been trained yet, only the model must stay what it was.

    Args:
        stored, plan: contents of `plan.json`.
        finished: what was trained is written already.
        allowed: the user asked to go on in any case.

    Raises:
        ResumeError: with a table.
    """
    if stored.get("plan_id") == plan["plan_id"]:
        return
    found = differences(stored.get("decides", {}), plan["decides"])
    what = "the folder holds a run of another plan"
    if finished:
        raise _refusal(f"{what}, which has finished its training", folder, found, helps=False)
    fixed = is_fixed(found)
    if fixed or ((folder / "checkpoints").is_dir() and not allowed):
        raise _refusal(what, folder, found, helps=not fixed)


def other_run(checkpoint: Path, found: Sequence[Difference]) -> ResumeError:
    """The refusal to train on from a checkpoint of another run."""
    return _refusal("the checkpoint belongs to another run", checkpoint, found, helps=not is_fixed(found))


def is_fixed(found: Sequence[Difference]) -> bool:
    """Whether nothing of the earlier training can be used."""
    return any(difference.effect == "fixed" for difference in found)


def _refusal(what: str, where: Path, found: Sequence[Difference], *, helps: bool) -> ResumeError:
    hint = "Undo the changes, or choose another output_dir=."
    if helps:
        hint += " To train on all the same: --allow-inexact-resume, and all that is made from then on will say so."
    return ResumeError(what, where=str(where), table=table(found), hint=hint)


def record(folder: Path, arm: str, step: int, found: Sequence[Difference]) -> None:
    """Note in the run folder that an arm's training went on with other settings after `step` steps."""
    entry = {
        "arm": arm,
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "differences": [difference.to_json() for difference in found],
    }
    write_json_atomic(folder / INEXACT_NAME, [*records(folder), entry])


def records(folder: Path) -> list[dict[str, Any]]:
    """Every inexact resume of a run, in order."""
    path = folder / INEXACT_NAME
    found: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    return found


def sentences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What reports and model cards say of inexact resumes, as `records` gives them."""
    return [
        f"Training{' of the control arm' if entry['arm'] == 'control' else ''} went on after step {entry['step']} with "
        f"other settings ({_words(entry['differences'])}): these are not the numbers of one undisturbed run."
        for entry in found
    ]


def trained_inexactly(provenance: Mapping[str, Any]) -> list[str]:
    """The same of an adapter or checkpoint, by its `ctxext.json`; of a curriculum's earlier stages too."""
    trainings = [*provenance.get("stages", []), provenance]
    return [sentence for each in trainings for sentence in sentences(each.get("inexact_resumes", []))]


def _words(found: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(Difference(**difference).words() for difference in found)
