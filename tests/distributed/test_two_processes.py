"""Two real processes train like one: the same losses, the same weights."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from safetensors.torch import load_file
from support import SilentReporter, child_environment, make_job, step_lines

from ctxext.errors import ResourceError, UsageError
from ctxext.pipeline.extend import extend
from ctxext.pipeline.recipes import recipe_of
from ctxext.train.loop import make_accelerator

SETTINGS = ("train.steps=3", "train.windows_per_step=4", "train.checkpoint_every=2")


def train_in_this_process(recipe_path: str, output: str) -> None:
    """What each of the processes runs; leaves a file that says who it was."""
    folder = Path(output)
    recipe = recipe_of(recipe_path, [*SETTINGS, f"output_dir={output}"])

    def note(metrics: Any) -> None:
        import torch.distributed as dist

        rank = dist.get_rank() if dist.is_initialized() else 0
        facts = {"pid": os.getpid(), "world_size": dist.get_world_size(), "backend": dist.get_backend()}
        (folder / f"rank-{rank}.json").write_text(json.dumps({**facts, "loss": metrics.loss}))

    extend(recipe, SilentReporter(on_step=note), last_stage="train")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run folders of one process and of two, with the same recipe."""
    folder = tmp_path_factory.mktemp("distributed")
    job = make_job(folder)
    extend(job.recipe(*SETTINGS, f"output_dir={folder}/one"), SilentReporter(), last_stage="train")
    # A fresh interpreter forks the two: this one may hold threads, which do not survive a fork.
    command = [sys.executable, __file__, str(job.recipe_path), str(folder / "two")]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        command, env=child_environment(PYTHONPATH=path), text=True, capture_output=True, timeout=500
    )
    assert finished.returncode == 0, finished.stderr
    return folder / "one", folder / "two"


def test_there_were_really_two_processes(runs: tuple[Path, Path]) -> None:
    facts = [json.loads((runs[1] / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert facts[0]["pid"] != facts[1]["pid"]
    assert [fact["world_size"] for fact in facts] == [2, 2]
    assert [fact["backend"] for fact in facts] == ["gloo", "gloo"]
    assert facts[0]["loss"] == facts[1]["loss"]
    state = json.loads((runs[1] / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["num_processes"] == 2
    random_states = load_file(runs[1] / "checkpoints" / "step-000003" / "random.safetensors")["cpu"]
    assert random_states.shape[0] == 2
    assert not torch.equal(random_states[0], random_states[1])


def test_two_processes_give_the_losses_and_weights_of_one(runs: tuple[Path, Path]) -> None:
    one, two = (step_lines(run) for run in runs)
    assert [line["step"] for line in two] == [1, 2, 3]
    for mine, theirs in zip(two, one, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert mine["num_tokens"] == theirs["num_tokens"]
    expected, weights = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert len(expected) == 28
    for name, tensor in expected.items():
        assert float((weights[name] - tensor).abs().max()) < 1e-5, name


def test_one_process_goes_on_for_two_where_no_random_numbers_are_drawn(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs[1], tmp_path / "two"))
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-000003")
    recipe = recipe_of(str(runs[1].parent / "recipe.yaml"), [*SETTINGS, f"output_dir={run}"])
    reporter = SilentReporter()
    extend(recipe, reporter, last_stage="train")
    (start,) = reporter.starts
    assert start.resumed_step == 2
    assert "1 instead of 2 processes" in start.messages[0]
    assert "the same but for the last bits" in start.messages[0]
    expected, weights = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (runs[0], run))
    for name, tensor in expected.items():
        assert float((weights[name] - tensor).abs().max()) < 1e-5, name
    assert not (run / "inexact.json").exists()


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    recipe = job.recipe("train.windows_per_step=3", "train.windows_per_device=2")
    with pytest.raises(UsageError, match="multiple of processes x windows_per_device"):
        extend(recipe, SilentReporter(), last_stage="train")


def test_a_launcher_whose_processes_accelerate_does_not_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What `accelerate launch --cpu --num_processes 2` was seen to do: the variable says two, the state says one.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="asked for several processes, but Accelerate runs as one"):
        make_accelerator(torch.float32, torch.device("cpu"), [], tmp_path)


def test_one_process_trains_in_one_precision_after_the_other(tmp_path: Path) -> None:
    # A notebook does; Accelerate alone refuses it, or silently keeps the first one.
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float32, "no"), (torch.bfloat16, "bf16")):
        assert make_accelerator(dtype, torch.device("cpu"), [], tmp_path).mixed_precision == precision


if __name__ == "__main__":
    gc.freeze()  # a collection in the forked processes would copy every page of the libraries
    debug_launcher(train_in_this_process, args=(sys.argv[1], sys.argv[2]), num_processes=2)
