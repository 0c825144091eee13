"""`results.json` of an arm's folder, derived from the samples beside it whenever they change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctxext.evaluation.store import RUN_NAME, load_samples
from ctxext.evaluation.tables import results_table
from ctxext.files import read_json, write_json_atomic

RESULTS_NAME = "results.json"


def derived_results(folder: Path, *, suite: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `results.json` holds, from `samples.jsonl` and `run.json` alone.

    Args:
        suite: for folders whose `run.json` does not hold it.

    Raises:
        ArtefactError: a line that is no sample.
    """
    header = folder / RUN_NAME
    run = read_json(header) if header.exists() else {}
    return results_table(load_samples(folder), run=run, suite=run.get("suite") or suite)


def write_results(folder: Path, *, suite: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Derive `results.json` anew and return it; see `derived_results`."""
    results = derived_results(folder, suite=suite)
    write_json_atomic(folder / RESULTS_NAME, results)
    return results
