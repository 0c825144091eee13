"""Monitors watch and change nothing: the same bits with all of them, without them, and resumed in the middle."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import Job, SilentReporter, make_job, step_lines, tiny_config, tiny_model
from torch import nn

from ctxext.data.packing import PackedWindow
from ctxext.pipeline import extend as pipeline
from ctxext.pipeline.extend import extend
from ctxext.planning.cost import model_shape
from ctxext.rope.patchers import apply_method
from ctxext.train.attention_entropy import AttentionMonitor, sampled_rows
from ctxext.train.metrics import StepMetrics, read_metrics
from ctxext.train.monitors import StepEvent
from ctxext.train.throughput import ThroughputMonitor
from ctxext.train.watch import make_monitors, reasons_against_attention

SETTINGS = (
    "lora.dropout=0.2",
    "train.activation_checkpointing=true",
    "train.windows_per_device=2",
    "train.memory.tile_tokens=32",
    "train.keep_checkpoints=4",
)
KEYS = ("loss", "grad_norm", "learning_rate", "num_tokens")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_training(one: Path, other: Path) -> None:
    mine, theirs = step_lines(one), step_lines(other)
    assert len(mine) == len(theirs) == 4
    for key in KEYS:
        assert [line[key] for line in mine] == [line[key] for line in theirs], key
    expected = weights(one)
    assert len(expected) == 28
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run with every monitor at every step, and with random numbers drawn in training."""
    job = make_job(tmp_path_factory.mktemp("watched"))
    extend(job.recipe(*SETTINGS, "train.monitors.attention_every=1"), SilentReporter(), last_stage="train")
    return job


def test_a_training_has_the_same_bits_with_all_monitors_and_with_none(
    watched: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = watched.folder / "plain"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_monitors", lambda *arguments: [])
        extend(watched.recipe(*SETTINGS, f"output_dir={plain}"), SilentReporter(), last_stage="train")
    _, monitors = read_metrics(watched.output)
    assert {name: len(lines) for name, lines in monitors.items()} == {"throughput": 4, "attention": 4}
    assert read_metrics(plain)[1] == {}
    assert_same_training(watched.output, plain)


def test_a_resumed_run_goes_on_watching_as_if_nothing_had_happened(watched: Job, tmp_path: Path) -> None:
    again = Path(shutil.copytree(watched.output, tmp_path / "again"))
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoints" / "step-000004")
    recipe = watched.recipe(*SETTINGS, "train.monitors.attention_every=1", f"output_dir={again}")
    reporter = SilentReporter()
    extend(recipe, reporter, last_stage="train")
    assert [start.resumed_step for start in reporter.starts] == [2]
    assert_same_training(watched.output, again)
    mine, theirs = (read_metrics(run)[1] for run in (watched.output, again))
    assert mine["attention"] == theirs["attention"]
    assert [line["num_tokens_so_far"] for line in mine["throughput"]] == [
        line["num_tokens_so_far"] for line in theirs["throughput"]
    ]


def test_how_often_attention_is_looked_at_is_no_other_plan(watched: Job) -> None:
    plans = {pipeline.make_plan(watched.recipe(f"train.monitors.attention_every={n}")).plan_id for n in (0, 1, 3)}
    assert len(plans) == 1
    other = pipeline.make_plan(watched.recipe("train.seed=3"))
    assert other.plan_id not in plans


def monitors_of(job: Job, *settings: str, **changes: Any) -> dict[str, Any]:
    recipe = job.recipe(*settings).model_copy(update=changes)
    config = apply_method(tiny_config(), recipe.rope, recipe.target_length, recipe.on_existing)
    found = make_monitors(recipe, config, torch.device("cpu"), torch.float32, 128)
    return {monitor.name: monitor for monitor in found}


def test_attention_is_left_out_where_asked_or_where_it_cannot_be_seen(watched: Job) -> None:
    assert list(monitors_of(watched)) == ["spikes", "throughput", "attention", "router_load"]
    assert "attention" not in monitors_of(watched, "train.monitors.attention_every=0")
    for setting, reason in (("train.compile=true", "compiled layers"), ("parallel.sequence=2", "spread over")):
        assert "attention" not in monitors_of(watched, setting)
        assert reason in " ".join(reasons_against_attention(watched.recipe(setting)))
    assert reasons_against_attention(watched.recipe()) == []


def event(step: int, windows: Sequence[PackedWindow], model: nn.Module, seconds: float = 0.5) -> StepEvent:
    num_tokens = sum(window.num_targets for window in windows)
    return StepEvent(StepMetrics(step, 40, 2.0, 1.0, 1e-3, num_tokens, 1.0, seconds), windows, model)


def window(num_tokens: int = 64) -> PackedWindow:
    return PackedWindow([number % 250 for number in range(num_tokens)], list(range(num_tokens)), [0], 0)


def look(monitor: AttentionMonitor, model: Any, step: int) -> list[dict[str, Any]]:
    monitor.before_step(step, [window()])
    model(torch.tensor([window().input_ids]), use_cache=False)
    return monitor.after_step(event(step, [window()], model))


def test_attention_is_looked_at_first_last_and_every_so_many_steps() -> None:
    monitor, model = AttentionMonitor(10, 35, 16, 64), tiny_model(initializer_range=0.5)
    seen = [step for step in range(1, 36) if look(monitor, model, step)]
    assert seen == [1, 10, 20, 30, 35]


def test_a_look_has_every_head_of_every_layer_and_the_long_range_share() -> None:
    line = look(AttentionMonitor(1, 4, 16, 64), tiny_model(initializer_range=0.5), 1)[0]
    assert [len(heads) for heads in line["entropy_bits"]] == [2, 2]
    assert line["layers"] == [0, 1]
    assert 0.0 < line["mean_entropy_bits"] < max(line["uniform_bits"]) < 6.0
    assert 0.0 < line["beyond_half_share"] < line["beyond_original_share"] < 1.0
    assert (line["beyond_original_tokens"], line["beyond_half_tokens"]) == (16, 32)


def test_heads_that_collapse_or_look_everywhere_are_flagged_and_warned_of() -> None:
    monitor, model = AttentionMonitor(1, 4, 16, 64), tiny_model(initializer_range=0.5)
    first = look(monitor, model, 1)[0]
    assert (first["num_collapsed"], first["num_uniform"], "warning" in first) == (0, 0, False)
    blind = tiny_model(initializer_range=0.5)
    nn.init.zeros_(blind.model.layers[1].self_attn.q_proj.weight)
    line = look(monitor, blind, 2)[0]
    assert line["uniform"] == [[1, 0], [1, 1]]
    assert "2 of 4 attention heads look at everything alike, 0 did" in line["warning"]
    sharp = tiny_model(initializer_range=0.5)
    sharp.model.layers[0].self_attn.q_proj.weight.data *= 1e4
    line = look(monitor, sharp, 3)[0]
    assert line["collapsed"] == [[0, 0], [0, 1]]
    assert "look at a single token" in line["warning"]
    restored = AttentionMonitor(1, 4, 16, 64)
    restored.restore(monitor.state())
    assert look(restored, sharp, 4)[0]["warning"] == line["warning"]


def test_rows_lie_in_the_second_half_and_hold_the_last() -> None:
    rows = sampled_rows(1000)
    assert len(rows) == 16
    assert rows[-1] == 999
    assert min(rows) >= 500
    assert sampled_rows(4) == [2, 3]


def test_utilization_is_the_models_work_over_the_devices_best() -> None:
    shape = model_shape(tiny_config())
    flops = 2 * shape.train_flops(64, activation_checkpointing=False)
    monitor = ThroughputMonitor(flops, 4 * flops, "the data sheet", torch.device("cpu"))
    first = monitor.after_step(event(1, [window()] * 2, nn.Identity(), seconds=0.5))[0]
    assert first["utilization"] == pytest.approx(0.5)
    assert (first["num_tokens_so_far"], first["speed_source"]) == (126, "the data sheet")
    restored = ThroughputMonitor(flops, 4 * flops, "the data sheet", torch.device("cpu"))
    restored.restore(monitor.state())
    second = restored.after_step(event(2, [window()], nn.Identity(), seconds=1.0))[0]
    assert (second["utilization"], second["num_tokens_so_far"]) == (pytest.approx(0.25), 189)
    assert second["peak_bytes"] > 0


def test_the_work_of_a_step_counts_attention_and_no_recomputation(watched: Job) -> None:
    lines = read_metrics(watched.output)[1]["throughput"]
    matrices = model_shape(tiny_config()).num_matrix_parameters
    # 96 tokens a window, 2 windows a step: twice the forward pass of the matrices, 3.5 times that of attention.
    assert lines[0]["flops_per_step"] == pytest.approx(2 * (4 * matrices * 96 + 3.5 * 2 * 2 * 32 * 96**2))
    assert "this CPU" in lines[0]["speed_source"]
    full = monitors_of(watched, adaptation="full")["throughput"]
    assert full._flops_per_step - lines[0]["flops_per_step"] == pytest.approx(2 * 2 * matrices * 96)
