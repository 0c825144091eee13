"""A process killed with SIGKILL at any moment of a save leaves a whole checkpoint, never one that looks whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from support import child_environment
from torch import Tensor

from ctxext.train.checkpoint import TrainState, newest_checkpoint, save_checkpoint

KILLS = 40
# Kills come within so many times the time of one save, so that one falls into any part of it.
LONGEST = 3.0


def content(step: int) -> dict[str, Tensor]:
    return {f"layer.{i}": torch.full((400,), float(step + i)) for i in range(8)}


def save(folder: Path, step: int) -> None:
    state = TrainState(step, {}, "data", 1)
    save_checkpoint(folder, state, content(step), content(-step), {"cpu": torch.get_rng_state()[None]}, keep=2)


def save_for_ever(folder: Path, first: int, acknowledged: Path) -> None:
    """Save step after step; after each one say that it is safe."""
    for step in range(first, first + 10_000):
        save(folder, step)
        acknowledged.write_text(str(step))


def kill_again_and_again(folder: Path) -> list[dict[str, object]]:
    """Fork a process that saves, kill it after a while, look at what it left; over and over on the same folder."""
    rng, acknowledged, seen = random.Random(0), folder / "acknowledged", []
    acknowledged.write_text("0")
    started = time.perf_counter()
    for step in range(3):
        save(folder / "measured", step)
    seconds = (time.perf_counter() - started) / 3
    for _ in range(KILLS):
        first = int(acknowledged.read_text() or 0) + 1
        child = os.fork()
        if child == 0:
            save_for_ever(folder / "checkpoints", first, acknowledged)
            os._exit(1)
        time.sleep(rng.uniform(0.0, LONGEST * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        names = sorted(path.name for path in (folder / "checkpoints").glob("*"))
        checkpoint, messages = newest_checkpoint(folder / "checkpoints")
        step = checkpoint.state.step if checkpoint else 0
        whole = checkpoint is None or (
            all(checkpoint.adapter[name].equal(tensor) for name, tensor in content(step).items())
            and all(checkpoint.optimizer[name].equal(tensor) for name, tensor in content(-step).items())
        )
        safe = int(acknowledged.read_text() or first - 1)
        left = sorted(path.name for path in (folder / "checkpoints").glob("*"))
        seen.append({"step": step, "safe": safe, "whole": whole, "messages": messages, "found": names, "left": left})
        acknowledged.write_text(str(step))
    return seen


def test_whatever_the_moment_the_newest_checkpoint_is_whole_and_none_that_was_safe_is_lost(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=child_environment(PYTHONPATH=path),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    seen = json.loads(finished.stdout)
    assert len(seen) == KILLS
    assert all(kill["whole"] for kill in seen)
    assert all(kill["messages"] == [] for kill in seen), "what can be seen is whole, so nothing is passed over"
    assert all(kill["step"] >= kill["safe"] for kill in seen)
    assert seen[-1]["step"] >= KILLS / 4
    # The kills really fell into saves: what they left half done was there, and is gone.
    assert sum(any(".partial-" in name for name in kill["found"]) for kill in seen) > KILLS / 4
    assert not any("." in name for kill in seen for name in kill["left"])
    # Killed between commit and pruning, more than `keep` are left, but never fewer; the next save prunes them all.
    assert all(len(kill["left"]) >= 2 for kill in seen if kill["step"] > 2)
    save(tmp_path / "checkpoints", seen[-1]["step"] + 1)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kill_again_and_again(Path(sys.argv[1]))))
