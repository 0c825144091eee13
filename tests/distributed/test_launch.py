"""The command line starts its own processes, and ends with them: killed, stopped by a signal, and going on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from support import child_environment, cli, make_job

from ctxext.errors import ResourceError, UsageError
from ctxext.files import read_json
from ctxext.pipeline.launch import _exit_code, join_launch, processes_to_start
from ctxext.recipe.parallel import ParallelBlock
from ctxext.recipe.schema import Recipe

STEPS = 2000  # more than either of the two commands gets to


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-??????"))


@pytest.fixture
def started() -> Iterator[list[psutil.Process]]:
    """Processes that must not outlive a failed test."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        if process.is_running():
            process.kill()


def test_a_killed_process_ends_the_others_and_a_signal_stops_all_of_them_after_a_checkpoint(
    tmp_path: Path, started: list[psutil.Process]
) -> None:
    job = make_job(tmp_path)
    settings = [f"train.steps={STEPS}", "train.checkpoint_every=5"]
    command = cli("train", str(job.recipe_path), *settings, "--num-processes", "2")

    def start() -> tuple[subprocess.Popen[str], list[psutil.Process]]:
        process = subprocess.Popen(
            command, env=child_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(psutil.Process(process.pid))
        parent = psutil.Process(process.pid)
        wait_for(lambda: len(parent.children()) == 2, process)
        workers = parent.children()
        started.extend(workers)
        return process, workers

    first, workers = start()
    wait_for(lambda: len(steps_saved(job.output)) > 0, first)
    os.kill(workers[1].pid, signal.SIGKILL)
    output, _ = first.communicate(timeout=100)
    assert first.returncode == 4
    assert "starting 2 processes" in output
    assert "another process of this run ended before its share was done" in output
    assert "process 1 was killed (SIGKILL)" in output
    assert not any(worker.is_running() for worker in workers)
    assert read_json(job.output / "status.json")["exit_code"] == 4
    saved = steps_saved(job.output)[-1]

    second, workers = start()
    wait_for(lambda: steps_saved(job.output)[-1] > saved, second)
    second.send_signal(signal.SIGTERM)  # to the command alone; its processes have sessions of their own
    output, _ = second.communicate(timeout=100)
    assert second.returncode == 143
    assert f"resumed at step {saved} of {STEPS}" in output
    assert not any(worker.is_running() for worker in workers)
    status = read_json(job.output / "status.json")
    assert status["exit_code"] == 143
    assert f"step {steps_saved(job.output)[-1]} of {STEPS} is saved" in status["reason"]


@dataclass
class Failure:
    """What PyTorch's agent says of a process."""

    exitcode: int
    timestamp: int


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ([(143, 10), (143, 10)], 143),
        ([(-15, 10), (5, 10)], 5),  # the agent ended the one that was still starting
        ([(3, 10), (-9, 40)], 3),  # and half a minute later the one that hung
    ],
)
def test_the_exit_code_is_that_of_the_process_that_failed_first(failures: list[tuple[int, int]], code: int) -> None:
    assert _exit_code({rank: Failure(*failure) for rank, failure in enumerate(failures)}) == code


def test_a_process_that_was_killed_is_named_although_another_one_failed_of_it() -> None:
    with pytest.raises(ResourceError, match="process 1 was killed"):
        _exit_code({0: Failure(4, 10), 1: Failure(-9, 10)})


def recipe_for(processes: int | str = "auto") -> Recipe:
    return Recipe.model_validate({"model": {"source": "m"}, "target_length": 64, "parallel": {"processes": processes}})


def test_without_gpus_and_without_being_asked_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxext.pipeline.launch.visible_devices", lambda: 0)
    assert processes_to_start(recipe_for(), None) == 1
    assert processes_to_start(recipe_for(2), None) == 2
    assert processes_to_start(recipe_for(), 3) == 3


def test_every_visible_device_gets_a_process_and_never_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxext.pipeline.launch.visible_devices", lambda: 4)
    assert processes_to_start(recipe_for(), None) == 4
    assert processes_to_start(recipe_for(), 1) == 1
    with pytest.raises(ResourceError, match="more processes than visible devices"):
        processes_to_start(recipe_for(), 5)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ResourceError, match="more processes than visible devices"):
        processes_to_start(recipe_for(), None)


def test_under_a_launcher_nothing_is_started_and_the_numbers_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes_to_start(recipe_for(), None) == 1
    assert processes_to_start(recipe_for(2), 2) == 1
    for recipe, asked in ((recipe_for(4), None), (recipe_for(), 1)):
        with pytest.raises(UsageError, match="the launcher started another number of processes"):
            processes_to_start(recipe, asked)
    with pytest.raises(UsageError, match="--num-processes contradicts the recipe"):
        processes_to_start(recipe_for(4), 2)


def test_tasks_of_srun_find_each_other_or_are_refused() -> None:
    task = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "PMI_SIZE": "16"}
    with pytest.raises(UsageError, match="nothing says where they meet"):
        join_launch({**task})
    environment = {**task, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    join_launch(environment)
    assert [environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["9", "1", "16"]
    with pytest.raises(UsageError, match="nothing says where they meet"):
        join_launch({"OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    for alone in ({}, {"SLURM_STEP_NUM_TASKS": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}):
        before = {**alone}
        join_launch(alone)
        assert alone == before
    assert ParallelBlock().processes == "auto"
