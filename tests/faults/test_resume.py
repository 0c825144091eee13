"""Real kills and a real full disk: nothing finished is lost, and going on gives what an undisturbed run gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from support import SilentReporter, child_environment, cli, file_size_limit, json_lines, make_job, run_cli, step_lines

from ctxext.errors import InterruptedRunError, ResourceError, exit_code_of
from ctxext.files import verify_manifest
from ctxext.pipeline.extend import extend
from ctxext.train.checkpoint import newest_checkpoint

STEPS = 90


def long_job(folder: Path) -> Path:
    """A recipe whose training takes a few seconds: long enough to be caught in the middle."""
    job = make_job(folder)
    values = yaml.safe_load(job.recipe_path.read_text())
    values["model"]["source"], values["output_dir"], values["evaluation"]["suite"] = "models/tiny", "run", "suite.yaml"
    values["data"] = {"sources": [{"kind": "generated-words"}]}
    values["lora"]["dropout"] = 0.1  # random numbers are drawn in every step, so their state must be resumed too
    values["train"] |= {"steps": STEPS, "windows_per_step": 4, "windows_per_device": 2, "checkpoint_every": 7}
    job.recipe_path.write_text(yaml.safe_dump(values))
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command as a user starts it, in the background."""
    return subprocess.Popen(
        cli(*arguments),
        cwd=folder,
        env=child_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Until something has happened in a running process."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended too early with {process.returncode}: {process.communicate()}")
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError("waited in vain")
        time.sleep(0.005)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def num_steps(run: Path) -> int:
    """Finished steps; a line that is being written is none yet."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return sum(line.endswith(b"\n") and "monitor" not in json.loads(line) for line in lines)


def stop_in_training(folder: Path, at_step: int, number: signal.Signals) -> tuple[int, str]:
    """Start training, send a signal once a step is finished, and return exit code and error output."""
    process = start(folder, "train", "recipe.yaml")
    wait_for(lambda: num_steps(folder / "run") >= at_step, process)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training that nothing interrupted."""
    folder = long_job(tmp_path_factory.mktemp("undisturbed"))
    finished = run_cli("train", "recipe.yaml", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return folder / "run"


def assert_equal_runs(run: Path, expected: Path) -> None:
    """Weights, moments and random state equal to the bit; every step once, with equal numbers."""
    for name in ("adapter", "optimizer", "random"):
        last = Path("checkpoints") / f"step-{STEPS:06d}" / f"{name}.safetensors"
        stored, wanted = (load_file(folder / last) for folder in (run, expected))
        assert stored.keys() == wanted.keys()
        assert all(stored[key].equal(tensor) for key, tensor in wanted.items()), name
    mine, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, expected))
    assert mine.keys() == theirs.keys()
    assert len(mine) == 28
    for name, tensor in theirs.items():
        assert mine[name].equal(tensor), name
    lines, expected_lines = step_lines(run), step_lines(expected)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "learning_rate", "num_tokens"):
        assert [line[key] for line in lines] == [line[key] for line in expected_lines], key


def test_a_training_killed_with_kill_9_goes_on_to_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    folder = long_job(tmp_path)
    code, _ = stop_in_training(folder, 30, signal.SIGKILL)
    assert code == -signal.SIGKILL
    steps_before = num_steps(folder / "run")
    assert 30 <= steps_before < STEPS
    assert not (folder / "run" / "adapter").exists()
    again = run_cli("train", "recipe.yaml", cwd=folder)
    assert again.returncode == 0, again.stderr
    resumed = next(line for line in again.stdout.splitlines() if "resumed at step" in line)
    assert steps_before - 7 <= int(resumed.split("resumed at step ")[1].split()[0]) <= steps_before
    assert_equal_runs(folder / "run", undisturbed)


def test_sigterm_and_sigint_save_the_finished_step_and_going_on_gives_the_same_bits(
    undisturbed: Path, tmp_path: Path
) -> None:
    folder = long_job(tmp_path)
    for number, code, at_step in ((signal.SIGTERM, 143, 10), (signal.SIGINT, 130, 40)):
        returned, errors = stop_in_training(folder, at_step, number)
        assert returned == code, errors
        finished = num_steps(folder / "run")
        assert at_step <= finished < STEPS
        checkpoint, messages = newest_checkpoint(folder / "run" / "checkpoints")
        assert checkpoint is not None
        assert (checkpoint.state.step, messages) == (finished, [])
        expected = f"ctxext: stopped by {number.name}; step {finished} of {STEPS} is saved. Run the same command again"
        assert errors.strip().startswith(expected)
        assert len(errors.strip().splitlines()) == 1
        status = json.loads((folder / "run" / "status.json").read_text())
        assert status["exit_code"] == code
    finished_run = run_cli("train", "recipe.yaml", cwd=folder)
    assert finished_run.returncode == 0, finished_run.stderr
    assert_equal_runs(folder / "run", undisturbed)


def test_an_evaluation_killed_with_kill_9_keeps_every_finished_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths = [number / 20 for number in range(21)]
    job = make_job(
        tmp_path, rows=[{"length": length, "depths": depths, "samples": 5} for length in (250, 100)], max_new_tokens=32
    )
    stored = tmp_path / "evaluation" / "samples.jsonl"
    process = start(
        tmp_path, "eval", "models/tiny", "--suite", "suite.yaml", "--output", "evaluation", "--beyond-reach"
    )
    wait_for(lambda: num_lines(stored) >= 20, process)
    process.kill()
    process.communicate(timeout=60)
    finished = stored.read_bytes()
    finished = finished[: finished.rindex(b"\n") + 1]
    assert 20 <= finished.count(b"\n") < 210
    from ctxext.pipeline.evaluate import evaluate_models
    from ctxext.pipeline.evaluation_plan import EvaluationRequest

    monkeypatch.chdir(tmp_path)
    suite = str(job.folder / "suite.yaml")
    evaluate_models(
        EvaluationRequest("models/tiny", suite=suite, output="evaluation", beyond_reach=True), SilentReporter()
    )
    assert stored.read_bytes().startswith(finished)
    names = [line["sample_id"] for line in json_lines(stored)]
    assert len(names) == len(set(names)) == 210


def test_a_signal_between_samples_of_an_evaluation_keeps_what_is_finished(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows=[{"length": 200, "depths": [0.0, 0.25, 0.5, 0.75, 1.0], "samples": 1}])
    reporter = SilentReporter(on_sample=lambda sample: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRunError, match="finished samples are saved") as caught:
        extend(job.recipe(), reporter)
    assert len(reporter.samples) == 1
    assert exit_code_of(caught.value) == 143
    stored = job.output / "eval" / "before" / "samples.jsonl"
    first = stored.read_text()
    assert len(first.splitlines()) >= 1
    extend(job.recipe(), SilentReporter())
    assert stored.read_text().startswith(first)
    assert len(json_lines(stored)) == 5


def test_a_full_disk_during_a_save_keeps_the_last_checkpoint_and_the_run_goes_on_later(tmp_path: Path) -> None:
    plain = make_job(tmp_path / "plain")
    extend(plain.recipe("train.steps=8"), SilentReporter(), last_stage="train")
    job = make_job(tmp_path / "full")
    recipe = job.recipe("train.steps=8", f"model.source={plain.folder}/models/tiny")
    # Small files still fit, tensors do not.
    limit = file_size_limit(8_000)

    def fill_the_disk(metrics: object) -> None:
        if metrics.step == 5:  # type: ignore[attr-defined]
            limit.__enter__()

    try:
        with pytest.raises(ResourceError, match="could not write the tensors") as caught:
            extend(recipe, SilentReporter(on_step=fill_the_disk), last_stage="train")
    finally:
        limit.__exit__(None, None, None)
    assert exit_code_of(caught.value) == 4
    assert json.loads((job.output / "status.json").read_text())["exit_code"] == 4
    checkpoints = sorted(path.name for path in (job.output / "checkpoints").iterdir())
    assert checkpoints == ["step-000002", "step-000004"]
    for name in checkpoints:
        verify_manifest(job.output / "checkpoints" / name)
    assert len(step_lines(job.output)) == 6
    reporter = SilentReporter()
    extend(recipe, reporter, last_stage="train")
    assert [start.resumed_step for start in reporter.starts] == [4]
    mine, theirs = (load_file(j.output / "adapter" / "adapter_model.safetensors") for j in (job, plain))
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())
    assert [line["step"] for line in step_lines(job.output)] == list(range(1, 9))


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    plain = make_job(tmp_path / "plain")
    extend(plain.recipe("train.steps=8"), SilentReporter(), last_stage="train")
    job = make_job(tmp_path / "damaged")

    def stop(metrics: object) -> None:
        if metrics.step == 5:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        extend(job.recipe("train.steps=8"), SilentReporter(on_step=stop), last_stage="train")
    newest = job.output / "checkpoints" / "step-000005" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    reporter = SilentReporter()
    extend(job.recipe("train.steps=8"), reporter, last_stage="train")
    (start,) = reporter.starts
    assert start.resumed_step == 4
    assert "skipped a damaged checkpoint" in start.messages[0]
    mine, theirs = (load_file(j.output / "adapter" / "adapter_model.safetensors") for j in (job, plain))
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())
