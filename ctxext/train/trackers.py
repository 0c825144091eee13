"""Trackers through Accelerate: TensorBoard files in the run folder, Weights & Biases, trackio and MLflow by name.

Each is asked for before any work: Accelerate leaves out what is not installed without a word, and W&B without a key
would end the run where training begins. Where they send what is up to their own settings (`WANDB_MODE=offline`,
`MLFLOW_TRACKING_URI`, `TRACKIO_SPACE_ID`); keys and tokens are theirs alone and never read here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
    get_available_trackers,
)

from ctxext.errors import ResourceError

PROJECT = "ctxext"
_NO_KEY_NEEDED = ("offline", "disabled", "dryrun", "shared")


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that could not start.

    Raises:
        ResourceError: a package is not installed, or W&B has nobody to send to.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [name for name in names if name not in available]
    if missing:
        raise ResourceError(
            "a tracker of the recipe is not installed",
            where="train.trackers",
            got=", ".join(missing),
            hint=" or ".join(f"pip install 'ctxext[{name}]'" for name in missing) + ", or leave it out.",
        )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online").lower() not in _NO_KEY_NEEDED and not _knows_key():
        raise ResourceError(
            "Weights & Biases is not logged in",
            where="train.trackers",
            hint="Run `wandb login`, or set WANDB_MODE=offline and send the run later with `wandb sync`.",
        )


def _knows_key() -> bool:
    """Whether W&B finds a key; the key itself is not looked at."""
    import wandb  # an optional extra

    return bool(wandb.login(prompt=False, verify=False))


def start_trackers(
    accelerator: Accelerator, names: Sequence[str], folder: Path, arm: str, config: dict[str, Any]
) -> None:
    """Start the trackers of one arm's training; on the main process only, as Accelerate does it.

    Args:
        folder: of the run.
        arm: what its curves are called.
        config: what is stored with them.

    Raises:
        ResourceError: a tracker does not start.
    """
    accelerator.trackers = []  # those of an arm before have ended
    accelerator.log_with = [_tracker(name, folder.resolve(), arm) for name in names]
    try:
        accelerator.init_trackers(PROJECT, config=config)
    except Exception as error:  # each has errors of its own: no store, no network, no account
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"a tracker could not start ({reason})",
            where="train.trackers",
            got=", ".join(names),
            hint="Its own settings say where it sends what; without it, leave it out of train.trackers.",
        ) from error


def stop_trackers(accelerator: Accelerator) -> None:
    """End the trackers of an arm; processes and device stay."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []


def _tracker(name: str, folder: Path, arm: str) -> GeneralTracker:
    run = f"{folder.name}-{arm}"
    if name == "tensorboard":
        return TensorBoardTracker(arm, folder / "tensorboard")
    if name == "wandb":
        return WandBTracker(PROJECT, name=run, group=folder.name, dir=str(folder))
    if name == "trackio":
        # A training that goes on, goes on in the same curve.
        return TrackioTracker(PROJECT, name=run, group=folder.name, resume="allow")
    return MLflowTracker(PROJECT, run_name=run)
