"""A run folder describes itself: recipe, plan, environment, status, and where every stage puts its results."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

from ctxext.errors import ArtefactError
from ctxext.evaluation.arms import ARM_FOLDERS
from ctxext.files import read_json, remove_partials, write_json_atomic, write_text_atomic
from ctxext.recipe.effects import flat
from ctxext.recipe.load import parse_document, to_yaml, validate_document
from ctxext.recipe.schema import Recipe
from ctxext.train.inexact import check_same_run, records

_PACKAGES = (
    "ctxext",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "tokenizers",
    "safetensors",
)

# What training writes: an adapter, or the whole model after full fine-tuning.
ADAPTER_NAME, WHOLE_NAME = TRAINED_NAMES = ("adapter", "trained")
# In a folder of `ctxext eval`: what its report says besides the samples.
FACTS_NAME = "evaluation.json"


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def trained(self) -> Path | None:
        """What training has written, with the extended config: an adapter, or a whole model; None before that."""
        return next((self.path / name for name in TRAINED_NAMES if (self.path / name).is_dir()), None)

    @property
    def merged(self) -> Path:
        """The plain checkpoint."""
        return self.path / "merged"

    @property
    def report(self) -> Path:
        """Heatmaps and page."""
        return self.path / "report"

    @property
    def control(self) -> Path:
        """The control arm's own metrics, checkpoints and adapter."""
        return self.path / "control"

    def evaluation(self, arm: str) -> Path:
        """Samples of one arm; the design's names `before` and `after` for base and extended."""
        return self.path / "eval" / ARM_FOLDERS.get(arm, arm)

    def open(
        self, recipe: Recipe, plan: dict[str, Any], environment: dict[str, Any], *, allow_inexact: bool = False
    ) -> list[str]:
        """Create the folder or recognise an interrupted run; what is worth knowing about the latter.

        Raises:
            ResumeError: the folder holds a run of another plan, and going on with it was not allowed.
        """
        stored_path, environment_path = self.path / "plan.json", self.path / "environment.json"
        notes: list[str] = []
        if stored_path.exists():
            finished = self.trained is not None
            check_same_run(read_json(stored_path), plan, self.path, finished=finished, allowed=allow_inexact)
            remove_partials(self.path)
            notes = _changes(read_json(environment_path) if environment_path.exists() else {}, environment)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.path / "recipe.yaml", recipe_yaml(recipe))
        write_json_atomic(stored_path, plan)
        if not environment_path.exists():
            write_json_atomic(environment_path, environment)
        return notes

    def recipe(self) -> Recipe:
        """The stored recipe.

        Raises:
            ArtefactError: no run here.
        """
        path = self.path / "recipe.yaml"
        if not path.is_file():
            raise ArtefactError("not a run folder (it has no recipe.yaml)", where=str(self.path))
        return validate_document(parse_document(path.read_text(encoding="utf-8"), str(path)), Recipe)

    def status(self) -> dict[str, Any]:
        """`status.json`, or an empty start."""
        path = self.path / "status.json"
        stored: dict[str, Any] = read_json(path) if path.exists() else {"stages": {}}
        return stored

    def stage_finished(self, stage: str, seconds: float) -> None:
        """Record a finished stage; times of interrupted tries add up."""
        status = self.status()
        status["stages"][stage] = round(status["stages"].get(stage, 0.0) + seconds, 1)
        self._write_status(status)

    def ended(self, exit_code: int, reason: str) -> None:
        """Record how the command ended: launchers flatten exit codes, this file does not."""
        status = self.status()
        if inexact := records(self.path):
            status["inexact_resumes"] = inexact
        status.update(exit_code=exit_code, reason=reason, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        self._write_status(status)

    def _write_status(self, status: dict[str, Any]) -> None:
        write_json_atomic(self.path / "status.json", status)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How the machine or its software differs from what a run began on; such a run is equal but for the last bits."""
    keys = ("python", "system", "device", "accelerator", "num_threads", "packages")
    stored, found = (flat({key: facts[key] for key in keys if key in facts}) for facts in (before, now))
    changed = [
        f"{key.removeprefix('packages.')} {stored[key]} -> {found.get(key)}"
        for key in stored
        if stored[key] != found.get(key)
    ]
    return (
        [f"not the machine or software that the run began on: {', '.join(changed)}; last bits may differ"]
        if changed
        else []
    )


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as YAML with every default written out."""
    return to_yaml(recipe.model_dump(mode="json"))


def environment_facts(device: str, dtype: str) -> dict[str, Any]:
    """Versions and machine, without anything that identifies it."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "dtype": dtype,
        "num_threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    if device.startswith("cuda"):
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
