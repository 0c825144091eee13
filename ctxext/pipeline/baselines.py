"""Recorded runs that ship with ctxext, found by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctxext.errors import CtxextError, unknown_name
from ctxext.files import shipped_directory
from ctxext.recipe.load import KeyPath


def baseline_folder(name: str) -> Path:
    """The folder of the recorded baseline `name`.

    Raises:
        UsageError: no such baseline, with the names there are.
    """
    root = shipped_directory("evals") / "baselines"
    names = sorted(path.parent.name for path in root.glob("*/baseline.json"))
    if name not in names:
        raise unknown_name("recorded baseline", name, names)
    return root / name


def recorded_check(values: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """A baseline that a recipe names must exist: a run should not find out in its last stage."""
    evaluation = values.get("evaluation")
    name = evaluation.get("recorded") if isinstance(evaluation, dict) else None
    if isinstance(name, str):
        try:
            baseline_folder(name)
        except CtxextError as error:
            yield ("evaluation", "recorded"), str(error)
