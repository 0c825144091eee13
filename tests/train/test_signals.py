"""When a run stops early: the time that is left, one signal or two, and what processes agree on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import SilentReporter, child_environment, json_lines, make_job

from ctxext.errors import InterruptedRunError, exit_code_of
from ctxext.files import read_json
from ctxext.pipeline.extend import extend
from ctxext.train import signals
from ctxext.train.signals import StopRequest

WAITS = """
import time
from ctxext.train.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(signals, "time", made)
    return made


def test_time_is_up_when_the_longest_pause_so_far_and_a_margin_no_longer_fit(clock: Clock) -> None:
    stop = StopRequest(max_seconds=1000.0)  # margin 20 s
    for now, expected in ((110, False), (120, False), (420, False), (430, False), (619, False), (621, True)):
        # Places where it can stop lie 10 and 300 s apart: 380 s are enough for another 1.2 x 300 + 20, fewer are not.
        clock.now = 100.0 + now
        assert stop.requested is expected, now
    with pytest.raises(
        InterruptedRunError, match=r"stopped by train.max_hours \(0.277778 h\); all of it. Run the same"
    ):
        stop.check("all of it")


def test_the_pace_of_one_stage_says_nothing_about_the_next(clock: Clock) -> None:
    stop = StopRequest(max_seconds=1000.0)
    for now in (0, 400):
        clock.now = 100.0 + now
        assert not stop.requested
    stop.new_pace()
    clock.now = 100.0 + 800
    assert not stop.requested
    clock.now = 100.0 + 990
    assert stop.requested


def test_the_time_counts_from_when_the_command_began(clock: Clock) -> None:
    assert not StopRequest(max_seconds=100.0).requested
    assert StopRequest(max_seconds=100.0, started=clock.now - 99).requested


def test_without_a_limit_only_signals_stop(clock: Clock) -> None:
    stop = StopRequest()
    clock.now = 1e9
    assert not stop.requested
    stop.check("nothing")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_but_not_the_echo_of_the_first(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True, env=child_environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(number)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number


def test_a_time_limit_in_training_saves_says_so_and_going_on_gives_the_same_bits(tmp_path: Path) -> None:
    plain, job = make_job(tmp_path / "plain"), make_job(tmp_path / "limited")
    extend(plain.recipe("train.steps=6"), SilentReporter(), last_stage="train")
    with pytest.raises(InterruptedRunError, match="stopped by train") as caught:
        extend(job.recipe("train.steps=6", "train.max_hours=0.00001"), SilentReporter(), last_stage="train")
    assert exit_code_of(caught.value) == 7
    status = read_json(job.output / "status.json")
    assert status["exit_code"] == 7
    assert "stopped by train.max_hours (1e-05 h); step 1 of 6 is saved" in status["reason"]
    assert [path.name for path in (job.output / "checkpoints").iterdir()] == ["step-000001"]
    reporter = SilentReporter()
    extend(job.recipe("train.steps=6"), reporter, last_stage="train")
    assert [start.resumed_step for start in reporter.starts] == [1]
    mine, theirs = (load_file(j.output / "adapter" / "adapter_model.safetensors") for j in (job, plain))
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())


def test_a_time_limit_between_samples_keeps_what_is_finished(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows=[{"length": 200, "depths": [0.0, 0.25, 0.5, 0.75, 1.0], "samples": 1}])
    with pytest.raises(InterruptedRunError, match="finished samples are saved") as caught:
        extend(job.recipe("train.max_hours=0.00001"), SilentReporter())
    assert exit_code_of(caught.value) == 7
    stored = job.output / "eval" / "before" / "samples.jsonl"
    first = stored.read_text()
    assert len(first.splitlines()) >= 1
    assert not (job.output / "checkpoints").exists()
    extend(job.recipe(), SilentReporter(), last_stage="report")
    assert stored.read_text().startswith(first)
    assert len(json_lines(stored)) == 5


def test_signals_are_left_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before
