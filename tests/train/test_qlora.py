"""QLoRA end to end: trained in 4 bits, resumed to the bit, merged into the weights as they came, and said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import SilentReporter, make_job, needs_bitsandbytes

from ctxext.export.merge import merge_adapter
from ctxext.export.stream import checkpoint_tensors
from ctxext.files import read_json
from ctxext.pipeline.extend import extend
from ctxext.pipeline.verify import verify_checkpoint

pytestmark = needs_bitsandbytes
SETTINGS = ("adaptation=qlora", "train.learning_rate=0.02", "train.steps=6")


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[float]]:
    """Run folder, what it told, its losses."""
    job = make_job(tmp_path_factory.mktemp("qlora"))
    losses: list[float] = []
    reporter = SilentReporter(on_step=lambda metrics: losses.append(metrics.loss))
    extend(job.recipe(*SETTINGS), reporter, last_stage="merge")
    return job.output, reporter.messages, losses


def test_training_lowers_the_loss_and_the_merge_is_proven(run: tuple[Path, list[str], list[float]]) -> None:
    output, messages, losses = run
    assert losses[-1] < losses[0] - 0.3
    assert any("read back by stock transformers" in message for message in messages)
    assert any("positions in effect" in line for line in verify_checkpoint(output / "merged"))


def test_what_the_quantisation_changed_is_measured_and_said(run: tuple[Path, list[str], list[float]]) -> None:
    output, messages, _ = run
    said = [message for message in messages if "trained against a base in 4 bits" in message]
    assert len(said) == 1
    assert "largest logit difference between the two" in said[0]
    expected = {"bits": 4, "type": "nf4", "double": True, "compute": "float32"}
    for folder in ("adapter", "merged"):
        assert read_json(output / folder / "ctxext.json")["quantisation"] == expected
        assert "quantization_config" not in read_json(output / folder / "config.json")


def test_the_adapter_is_merged_into_the_weights_as_they_came(
    run: tuple[Path, list[str], list[float]], tmp_path: Path
) -> None:
    output = run[0]
    shown = merge_adapter(output / "adapter", tmp_path / "streamed", "float32")
    assert shown.way.startswith("merged file by file")
    assert sum("the same next token at" in line for line in shown.summary()) == 1
    streamed, memory = (checkpoint_tensors(folder) for folder in (tmp_path / "streamed", output / "merged"))
    base = checkpoint_tensors(output.parent / "models" / "tiny")
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    weight = base.read(f"{name}.weight") + 2.0 * (b @ a)  # alpha 8 / rank 4
    for merged in (streamed, memory):
        assert torch.allclose(merged.read(f"{name}.weight"), weight, atol=1e-6)


def test_a_weaker_merge_is_not_compared_with_what_was_trained(
    run: tuple[Path, list[str], list[float]], tmp_path: Path
) -> None:
    shown = merge_adapter(run[0] / "adapter", tmp_path / "half", "float32", scale=0.5)
    assert any(line.endswith("against a base in 4 bits") for line in shown.summary())
    assert not any("next token" in line for line in shown.summary())


def test_an_interrupted_run_goes_on_to_the_bit(run: tuple[Path, list[str], list[float]], tmp_path: Path) -> None:
    job = make_job(tmp_path)

    def stop(metrics: Any) -> None:
        if metrics.step == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        extend(job.recipe(*SETTINGS), SilentReporter(on_step=stop), last_stage="train")
    extend(job.recipe(*SETTINGS), SilentReporter(), last_stage="train")
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run[0], job.output))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("lora.embeddings_and_norms=true",), id="embeddings and norms"),
        pytest.param(("lora.weight_decomposed=true",), id="DoRA"),
        pytest.param(("train.activation_checkpointing=true", "train.memory.tile_tokens=32"), id="checkpoints, tiles"),
        pytest.param(("train.optimizer=adamw-8bit", "lora.rank=64"), id="moments in 8 bits"),
    ],
)
def test_what_else_a_recipe_asks_for_goes_with_it(tmp_path: Path, settings: tuple[str, ...]) -> None:
    job, reporter = make_job(tmp_path), SilentReporter()
    extend(job.recipe("adaptation=qlora", "train.steps=2", *settings), reporter, last_stage="merge")
    assert any("read back by stock transformers" in message for message in reporter.messages)
    assert any("largest logit difference between the two" in message for message in reporter.messages)
