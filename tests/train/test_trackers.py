"""Trackers are refused before any work where they cannot start, and get the numbers of steps and monitors."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from support import SilentReporter, make_job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctxext.errors import ResourceError
from ctxext.pipeline.extend import extend
from ctxext.train import trackers
from ctxext.train.trackers import require_trackers, start_trackers, stop_trackers


def scalars(folder: Path) -> dict[str, list[int]]:
    """Steps of every curve in a folder of TensorBoard files."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard", "mlflow"])
    job = make_job(tmp_path)
    with pytest.raises(ResourceError, match=r"pip install 'ctxext\[wandb\]' or pip install 'ctxext\[trackio\]'"):
        extend(job.recipe("train.trackers=[tensorboard, wandb, trackio, mlflow]"), SilentReporter())
    assert not job.output.exists()


@pytest.mark.parametrize(
    ("mode", "known", "refused"), [("online", False, True), ("online", True, False), ("offline", False, False)]
)
def test_wandb_without_a_key_is_refused_unless_offline(
    mode: str, known: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setattr(trackers, "_knows_key", lambda: known)
    monkeypatch.setenv("WANDB_MODE", mode)
    if refused:
        with pytest.raises(ResourceError, match="WANDB_MODE=offline"):
            require_trackers(["wandb"])
    else:
        require_trackers(["wandb"])


def test_steps_and_monitors_of_each_arm_have_curves_of_their_own(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    accelerator = Accelerator(cpu=True)
    for arm, steps in (("yarn", (1, 2)), ("none", (5,))):
        start_trackers(accelerator, ["tensorboard"], job.output, arm, {"plan_id": "p"})
        for step in steps:
            accelerator.log({"loss": 2.0, "attention/mean_entropy_bits": 3.0}, step=step)
        stop_trackers(accelerator)
    for arm, expected in (("yarn", [1, 2]), ("none", [5])):
        found = scalars(job.output / "tensorboard" / arm)
        assert found["loss"] == found["attention/mean_entropy_bits"] == expected, arm


def test_a_run_logs_its_steps_and_what_its_monitors_say(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    extend(job.recipe("train.trackers=[tensorboard]", "train.steps=2"), SilentReporter(), last_stage="train")
    found = scalars(job.output / "tensorboard" / "yarn")
    for name in ("loss", "grad_norm", "learning_rate", "throughput/utilization", "attention/mean_entropy_bits"):
        assert found[name] == [1, 2], name


def test_a_tracker_that_does_not_start_is_no_bug_of_ours(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(ResourceError, match="a tracker could not start"):
        start_trackers(Accelerator(cpu=True), ["tensorboard"], tmp_path, "yarn", {})
