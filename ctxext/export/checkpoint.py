"""The exported config in both forms, so that old and new readers compute the same positions.

transformers 4 and mlx-lm read only top-level `rope_theta` and `rope_scaling`; given `rope_parameters` alone they run
unscaled with theta 10,000 and say nothing. transformers 5 reads either. The two forms never disagree, because one is
derived from the other here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctxext.files import read_json, write_json_atomic


def add_older_form(config: dict[str, Any]) -> dict[str, Any]:
    """A config dict with `rope_theta` and `rope_scaling` beside its flat `rope_parameters`."""
    parameters = dict(config["rope_parameters"])
    theta = parameters.pop("rope_theta")
    scaling = None if parameters.get("rope_type") == "default" else parameters
    return {**config, "rope_theta": theta, "rope_scaling": scaling}


def write_both_forms(folder: Path) -> None:
    """Rewrite `config.json` in `folder` with both forms."""
    path = folder / "config.json"
    write_json_atomic(path, add_older_form(read_json(path)))
