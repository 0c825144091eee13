"""A signal to one of two processes ends both alike: one checkpoint, one exit code, one message, and the same bits."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate import debug_launcher
from safetensors.torch import load_file
from support import SilentReporter, child_environment, make_job

from ctxext.errors import InterruptedRunError, exit_code_of
from ctxext.pipeline.extend import extend
from ctxext.pipeline.recipes import recipe_of
from ctxext.train.metrics import read_metrics

SETTINGS = ("train.steps=6", "train.windows_per_step=4", "lora.dropout=0.1")


def train_in_this_process(recipe_path: str, stopped_rank: str, setting: str) -> None:
    """What each of the processes runs; leaves a file that says how it ended."""
    import torch.distributed as dist

    recipe = recipe_of(recipe_path, [*SETTINGS, *setting.split()])

    def stop(metrics: Any) -> None:
        if metrics.step == 3 and dist.get_rank() == int(stopped_rank):
            os.kill(os.getpid(), signal.SIGTERM)

    code, message = 0, ""
    try:
        extend(recipe, SilentReporter(on_step=stop), last_stage="train")
    except InterruptedRunError as error:
        code, message = exit_code_of(error), str(error)
    ended = Path(recipe_path).parent / f"rank-{dist.get_rank()}.json"
    ended.write_text(json.dumps({"code": code, "message": message}))


def launch(recipe_path: Path, stopped_rank: int, setting: str = "") -> list[dict[str, Any]]:
    """Train in two processes (a fresh interpreter forks them); how each ended."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, __file__, str(recipe_path), str(stopped_rank), setting],
        env=child_environment(PYTHONPATH=path),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads((recipe_path.parent / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_a_time_limit_and_a_signal_to_one_end_both_alike_and_both_go_on_to_the_same_bits(tmp_path: Path) -> None:
    undisturbed, job = make_job(tmp_path / "undisturbed"), make_job(tmp_path / "stopped")
    assert [ended["code"] for ended in launch(undisturbed.recipe_path, -1)] == [0, 0]
    for stopped_rank, setting, code, why in (
        (-1, "train.max_hours=0.00001", 7, "stopped by train.max_hours (1e-05 h); step 1 of 6 is saved"),
        (1, "", 143, "stopped by SIGTERM; step 3 of 6 is saved"),
    ):
        ended = launch(job.recipe_path, stopped_rank, setting)
        assert ended[0] == ended[1]
        assert ended[0]["code"] == code
        assert why in ended[0]["message"]
        assert json.loads((job.output / "status.json").read_text())["exit_code"] == code
    assert sorted(path.name for path in (job.output / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert [ended["code"] for ended in launch(job.recipe_path, -1)] == [0, 0]
    mine, theirs = (load_file(j.output / "adapter" / "adapter_model.safetensors") for j in (job, undisturbed))
    assert len(theirs) == 28
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())
    losses = [[line["loss"] for line in read_metrics(j.output)[0]] for j in (job, undisturbed)]
    assert losses[0] == losses[1]


if __name__ == "__main__":
    gc.freeze()  # a collection in the forked processes would copy every page of the libraries
    debug_launcher(train_in_this_process, args=(sys.argv[1], sys.argv[2], sys.argv[3]), num_processes=2)
