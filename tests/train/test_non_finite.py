"""Steps that are not finite: left out whole, counted over interruptions, never more than three in a row."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import Job, SilentReporter, byte_tokenizer, make_job, tiny_model

from ctxext.errors import DivergedError, InterruptedRunError
from ctxext.model.load import quiet
from ctxext.pipeline.extend import extend
from ctxext.train.metrics import read_metrics
from ctxext.train.non_finite import NonFinitePolicy
from ctxext.train.step import StepResult

GOOD = StepResult(2.0, 1.0, 10)
BAD = StepResult(math.nan, math.nan, 10, "loss nan, gradient norm nan")
SKIP = ("train.non_finite=skip", "train.windows_per_step=1", "train.checkpoint_every=1")


def spoiled_job(folder: Path) -> Job:
    """The training text has no digits, facts have: a window with a fact has no finite loss."""
    job = make_job(folder)
    model = tiny_model()
    with torch.no_grad():
        for digit in "012346789":  # 5 is among the tokens on which the loss is proved before training
            model.get_input_embeddings().weight[byte_tokenizer()(digit).input_ids[0]] = math.inf
    with quiet():
        model.save_pretrained(folder / "models" / "tiny")
    return job


def train(job: Job, *overrides: str, stop_at: int | None = None) -> list[str]:
    """Train, perhaps with a SIGTERM in a step; what it told."""

    def stop(metrics: Any) -> None:
        if metrics.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    reporter = SilentReporter(on_step=stop)
    extend(job.recipe(*SKIP, *overrides), reporter, last_stage="train")
    return reporter.messages


def test_three_in_a_row_are_skipped_and_the_fourth_ends_the_training() -> None:
    policy = NonFinitePolicy("skip")
    for step, result in enumerate([BAD, BAD, BAD, GOOD, BAD, BAD, BAD], start=1):
        note = policy.judge(result, step)
        assert (note is None) == (result is GOOD)
        assert note is None or f"step {step} skipped" in note
    with pytest.raises(DivergedError, match="step 8 is the 4th in a row"):
        policy.judge(BAD, 8)


def test_the_default_stops_at_the_first() -> None:
    policy = NonFinitePolicy("stop")
    assert policy.judge(GOOD, 1) is None
    with pytest.raises(DivergedError, match="step 2 gave a value that is not finite"):
        policy.judge(BAD, 2)


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[dict[str, Any]]]:
    job = spoiled_job(tmp_path_factory.mktemp("skipping"))
    train(job, "data.facts.share=0.4", "train.steps=12")
    return job, read_metrics(job.output)[0]


def test_skipped_steps_say_so_and_count(skipping: tuple[Job, list[dict[str, Any]]]) -> None:
    job, lines = skipping
    assert [line["step"] for line in lines] == list(range(1, 13))
    skipped = [line for line in lines if "skipped" in line]
    assert 3 <= len(skipped) < 9
    assert all(line["loss"] is None and "nan" in line["skipped"] for line in skipped)
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines if "skipped" not in line)
    assert all(t.isfinite().all() for t in load_file(job.output / "adapter" / "adapter_model.safetensors").values())


def test_a_skipped_step_changes_neither_weights_nor_moments(tmp_path: Path) -> None:
    job = spoiled_job(tmp_path)
    train(job, "data.facts.share=0.4", "train.steps=12", "train.keep_checkpoints=12")
    states = [
        {
            (name, key): tensor
            for name in ("adapter", "optimizer")
            for key, tensor in load_file(
                job.output / "checkpoints" / f"step-{step:06d}" / f"{name}.safetensors"
            ).items()
        }
        for step in range(1, 13)
    ]
    lines = read_metrics(job.output)[0]
    for before, after, line in zip(states, states[1:], lines[1:], strict=False):
        unchanged = before.keys() == after.keys() and all(after[key].equal(t) for key, t in before.items())
        assert unchanged == ("skipped" in line), line


def test_an_interrupted_run_skips_what_the_undisturbed_one_skips(
    skipping: tuple[Job, list[dict[str, Any]]], tmp_path: Path
) -> None:
    undisturbed, lines = skipping
    (first, *_) = [line["step"] for line in lines if "skipped" in line]
    job = spoiled_job(tmp_path)
    settings = ("data.facts.share=0.4", "train.steps=12")
    with pytest.raises(InterruptedRunError):
        train(job, *settings, stop_at=first)
    train(job, *settings)
    theirs = [(line["loss"], line.get("skipped")) for line in lines]
    assert [(line["loss"], line.get("skipped")) for line in read_metrics(job.output)[0]] == theirs
    mine, expected = (load_file(j.output / "adapter" / "adapter_model.safetensors") for j in (job, undisturbed))
    assert all(mine[name].equal(tensor) for name, tensor in expected.items())


def test_steps_in_a_row_are_counted_over_an_interruption(tmp_path: Path) -> None:
    job = spoiled_job(tmp_path)
    settings = ("data.facts.share=1.0", "train.steps=12")
    with pytest.raises(InterruptedRunError):
        train(job, *settings, stop_at=2)
    with pytest.raises(DivergedError, match="step 4 is the 4th in a row"):
        train(job, *settings)
    assert [line["step"] for line in read_metrics(job.output)[0]] == [1, 2, 3]
