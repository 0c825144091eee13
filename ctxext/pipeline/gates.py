"""Gates at the end of a run or of `ctxext eval`: judged, stored, told, and raised when not met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ctxext.evaluation.arms import Arm
from ctxext.evaluation.gates import check_gates, gate_error
from ctxext.files import write_json_atomic
from ctxext.pipeline.reporter import Reporter
from ctxext.recipe.gates import GatesBlock


def enforce_gates(
    gates: GatesBlock,
    arms: Sequence[Arm],
    folder: Path,
    reporter: Reporter,
    *,
    original_length: int,
    answer_tokens: int,
    judged: str = "extended",
) -> None:
    """Write `gates.json` into `folder` and say every outcome.

    Raises:
        GateError: a gate is not met; everything that was made stays.
    """
    outcomes = check_gates(gates, arms, original_length=original_length, judged=judged, answer_tokens=answer_tokens)
    write_json_atomic(folder / "gates.json", [asdict(outcome) for outcome in outcomes])
    for outcome in outcomes:
        reporter.info(outcome.sentence)
    if error := gate_error(outcomes):
        raise error
