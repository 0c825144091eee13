"""The probe tries the largest step before the first one, changes nothing, and says what does not fit or is too dear."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support import Job, SilentReporter, make_job, tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM

from ctxext.errors import ResourceError, exit_code_of
from ctxext.model.lora import add_lora
from ctxext.model.savings import Savings, apply_savings, savings_of, without_savings
from ctxext.pipeline.extend import extend
from ctxext.planning.memory import StepShape, trace_step
from ctxext.planning.parallel_plan import ParallelPlan
from ctxext.recipe.schema import LoraBlock, Recipe
from ctxext.rope.patchers import extend_config
from ctxext.train import worst_case
from ctxext.train.metrics import read_metrics
from ctxext.train.optimizer import make_optimizer
from ctxext.train.probe import Probe, ProbeShape, probe_step
from ctxext.train.step import StepResult, SummedLoss, run_step
from ctxext.train.worst_case import Prepared, try_worst_case

CPU = torch.device("cpu")
SHAPE = ProbeShape(windows=2, window_tokens=96, isolated=False, passes=3, windows_per_step=6)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


class Training:
    """A model that has trained for a step, ready for the next one."""

    def __init__(self, recipe: Recipe, *, trained: bool = True, **changes: Any) -> None:
        torch.manual_seed(0)
        self.config = extend_config(tiny_config(**changes), target_length=256)
        self.model: Any = add_lora(LlamaForCausalLM(self.config), LoraBlock(rank=4, dropout=0.1), seed=0).train()
        self.savings = savings_of(recipe.train, SHAPE.window_tokens)
        apply_savings(self.model, self.savings)
        self.accelerator = Accelerator(cpu=True, mixed_precision="no")
        optimizer = make_optimizer(self.model, recipe.train)
        self.loss, self.optimizer = self.accelerator.prepare(SummedLoss(self.model), optimizer)
        self.seen: list[int] = []
        if trained:
            self.run(self.optimizer, SHAPE.rows())

    def run(self, optimizer: Any, windows: list[Any]) -> StepResult:
        self.seen.append(len(windows))
        return run_step(self.accelerator, self.loss, optimizer, windows, SHAPE.windows, 1.0)

    def prepared(self) -> Prepared:
        return Prepared(
            accelerator=self.accelerator,
            run=self.run,
            model=self.loss,
            adapted=self.model,
            optimizer=self.optimizer,
            config=self.config,
            dtype=torch.float32,
            parallel=ParallelPlan(windows=6, passes=3),
        )

    def state(self) -> dict[str, Tensor]:
        """Everything that decides later numbers."""
        moments = {
            f"{number}.{key}": value.clone()
            for number, values in enumerate(self.optimizer.state.values())
            for key, value in values.items()
        }
        parameters = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        rates = torch.tensor([group["lr"] for group in self.optimizer.param_groups])
        return {**parameters, **buffers, **moments, "random": torch.get_rng_state(), "rates": rates}


@pytest.mark.parametrize("trained", [True, False])
def test_the_probe_changes_no_bit_of_what_training_goes_on_from(job: Job, trained: bool) -> None:
    training = Training(job.recipe("train.weight_decay=0.1"), trained=trained)
    name = next(name for name, _ in training.model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        training.model.get_parameter(name).view(-1)[:32] = torch.tensor([-0.0, 1e-40] * 16)
    before = training.state()
    probe_step(training.run, training.loss, training.optimizer, SHAPE, CPU)
    after = training.state()
    assert before.keys() == after.keys()
    assert any(".exp_avg" in key for key in before) == trained
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
        assert torch.equal(value.signbit(), after[key].signbit()), key
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_losses_of_a_run_are_the_same_to_the_bit_with_and_without_the_probe(job: Job) -> None:
    losses = []
    for probe in ("true", "false"):
        output = job.folder / probe
        extend(
            job.recipe(f"train.probe={probe}", "lora.dropout=0.1", f"output_dir={output}"),
            SilentReporter(),
            last_stage="train",
        )
        losses.append([(line["loss"], line["grad_norm"]) for line in read_metrics(output)[0]])
        assert (output / "probe.json").exists() == (probe == "true")
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_the_probed_step_is_the_largest_of_the_run_and_is_told(job: Job) -> None:
    reporter = SilentReporter()
    extend(
        job.recipe("train.windows_per_step=4", "train.windows_per_device=2"),
        reporter,
        last_stage="train",
    )
    (start,) = reporter.starts
    stored = json.loads((job.output / "probe.json").read_text())
    assert start.probe == Probe(**stored)
    assert (stored["windows"], stored["window_tokens"]) == (2, 96)
    assert stored["step_seconds"] == pytest.approx(2 * stored["seconds"])
    assert stored["tokens_per_second"] == pytest.approx(4 * 95 / stored["step_seconds"])
    assert "2 x 96 tokens" in start.probe.lines()[0]


def test_isolated_windows_are_probed_with_two_documents_each() -> None:
    (row, _) = replace(SHAPE, isolated=True).rows()
    assert len(row.position_ids) == len(row.input_ids) == 96
    assert row.position_ids.count(0) == 2
    assert SHAPE.rows()[0].position_ids == list(range(96))


def test_measured_memory_is_what_the_trace_says(job: Job) -> None:
    """Only roughly: resident memory also has what matrix products pack and what the C library rounds up to."""
    changes = {"hidden_size": 128, "intermediate_size": 4096, "vocab_size": 260}
    training = Training(job.recipe(), **changes)  # trained: libraries have what they load for a first step
    shape = replace(SHAPE, windows=1, window_tokens=2048)
    probe = probe_step(training.run, training.loss, training.optimizer, shape, CPU)
    step = StepShape(1, 2048, torch.float32, "cpu")
    traced = trace_step(training.config, LoraBlock(rank=4), Savings(), step, SummedLoss)
    assert traced.peak_bytes > 300 * 2**20
    assert probe.measured_bytes is not None
    assert 0.9 < probe.measured_bytes / traced.peak_bytes < 1.4


@contextmanager
def address_space_left(num_bytes: int) -> Iterator[None]:
    """The kernel refuses this process more memory than that: nothing is simulated."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_step_that_runs_out_of_memory_says_what_to_change_and_changes_nothing(job: Job) -> None:
    recipe = job.recipe("train.windows_per_device=2", "train.windows_per_step=6")
    training = Training(recipe, intermediate_size=100_000)
    before = training.state()
    with address_space_left(128 * 2**20), pytest.raises(ResourceError, match="does not fit into memory") as caught:
        try_worst_case(training.prepared(), recipe)
    assert exit_code_of(caught.value) == 4
    message = str(caught.value)
    assert "2 x 96 tokens in one pass" in message
    assert "1. train.windows_per_device=1" in message
    assert "which fits" in message
    after = training.state()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.fixture
def judged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of this test's size are too short to be judged otherwise."""
    monkeypatch.setattr(worst_case, "_JUDGED_FROM_SECONDS", 0.0)


def slow_checkpoints(training: Training, seconds: float) -> None:
    """Makes checkpointing dear: a copy of every layer's input that takes its time."""
    for module in training.model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            plain = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *args, plain=plain, **kwargs: (
                time.sleep(seconds),
                plain(*args, **kwargs),
            )[1]


@pytest.mark.usefixtures("judged_at_once")
def test_a_saving_that_is_not_needed_and_costs_a_third_of_the_speed_is_refused_unless_allowed(job: Job) -> None:
    asked = ("train.activation_checkpointing=true", "train.windows_per_device=2", "train.windows_per_step=6")
    training = Training(job.recipe(*asked))
    slow_checkpoints(training, 0.5)
    with pytest.raises(ResourceError, match=r"costs \d\d% of the speed") as caught:
        try_worst_case(training.prepared(), job.recipe(*asked))
    assert "train.activation_checkpointing=false" in str(caught.value)
    allowed = job.recipe(*asked, "train.allow_slow=true")
    assert try_worst_case(training.prepared(), allowed).attention is not None
    automatic = job.recipe("train.windows_per_device=2", "train.windows_per_step=6")
    assert try_worst_case(training.prepared(), automatic).seconds > 1.0


def test_without_savings_a_model_computes_everything_once_and_gets_them_back(job: Job) -> None:
    recipe = job.recipe("train.activation_checkpointing=true", "train.memory.tile_tokens=32")
    training = Training(recipe, trained=False)
    calls = []
    norm = training.model.get_base_model().model.layers[0].input_layernorm
    handle = norm.register_forward_pre_hook(lambda *args: calls.append("norm"))
    counts = []
    for plain in (False, True, False):
        calls.clear()
        with without_savings(training.model, training.savings) if plain else nullcontext():
            training.run(training.optimizer, SHAPE.rows())
        counts.append((len(calls), "forward" in norm.__dict__))
    handle.remove()
    assert training.savings == Savings(checkpoint_every=1, tile_tokens=32)
    assert counts[0][0] == counts[2][0] == 2
    assert counts[1][0] == 1
