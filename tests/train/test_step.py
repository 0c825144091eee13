"""One optimizer step: the same sum however it is split, the plain mean loss, and a hard stop before bad updates."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from support import SilentReporter, byte_tokenizer, make_job, tiny_config, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ctxext.data.packing import PackedWindow
from ctxext.data.positions import skip_wise_positions
from ctxext.errors import DivergedError, exit_code_of
from ctxext.files import sha256_file, verify_manifest
from ctxext.model.load import quiet
from ctxext.model.lora import add_lora, num_trainable
from ctxext.pipeline.extend import extend
from ctxext.recipe.schema import LoraBlock
from ctxext.rope.patchers import extend_config
from ctxext.train.non_finite import NonFinitePolicy
from ctxext.train.schedule import learning_rate_at
from ctxext.train.step import StepResult, SummedLoss, run_step

LENGTH = 64


def windows(count: int, seed: int = 0) -> list[PackedWindow]:
    """Random tokens at skip-wise positions up to 256."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [rng.randrange(256) for _ in range(LENGTH)]
        positions = skip_wise_positions([rng.randrange(1, LENGTH)], LENGTH, 256, rng)
        made.append(PackedWindow(ids, positions, [0], 0))
    return made


def adapted_model() -> PeftModel:
    """A YaRN-extended model with a LoRA that is not at its start any more: every one of its weights has a gradient."""
    torch.manual_seed(0)
    model = add_lora(LlamaForCausalLM(extend_config(tiny_config(), target_length=256)), LoraBlock(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.train()
    return model


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def one_step(
    model: PeftModel, rows: list[PackedWindow], per_device: int = 1, max_grad_norm: float = 1e9
) -> tuple[StepResult, dict[str, Tensor]]:
    """Plain gradient descent with rate 1, so that the change of a weight *is* its gradient."""
    before = trained(model)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    wrapped, optimizer = accelerator.prepare(SummedLoss(model), optimizer)
    result = run_step(accelerator, wrapped, optimizer, rows, per_device, max_grad_norm)
    NonFinitePolicy("stop").judge(result, 1)
    return result, {name: before[name] - after for name, after in trained(model).items()}


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


@pytest.mark.parametrize("per_device", [1, 2, 4])
def test_accumulation_changes_neither_loss_nor_gradient(per_device: int) -> None:
    whole, expected = one_step(adapted_model(), windows(4), per_device=4)
    split, gradient = one_step(adapted_model(), windows(4), per_device=per_device)
    assert split.loss == pytest.approx(whole.loss, abs=1e-6)
    assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    assert split.num_tokens == whole.num_tokens == 4 * (LENGTH - 1)
    assert len(gradient) == 28
    for name in expected:
        assert float(gradient[name].abs().max()) > 0, name
        assert float((gradient[name] - expected[name]).abs().max()) < 1e-6, name


def plain_loss(model: PeftModel, rows: list[PackedWindow]) -> Tensor:
    """Mean cross entropy from the whole model's logits."""
    ids = torch.tensor([row.input_ids for row in rows])
    positions = torch.tensor([row.position_ids for row in rows])
    output = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
    return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_loss_and_gradient_are_those_of_the_plain_mean_cross_entropy() -> None:
    reference = adapted_model()
    loss = plain_loss(reference, windows(3))
    loss.backward()
    result, gradient = one_step(adapted_model(), windows(3))
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert float((gradient[name] - parameter.grad).abs().max()) < 1e-6, name


def test_a_token_behind_a_gap_of_positions_sees_what_stands_before_the_gap() -> None:
    model, (row,) = adapted_model(), windows(1)
    gap = next(i for i in range(1, LENGTH) if row.position_ids[i] > row.position_ids[i - 1] + 1)
    changed = [*row.input_ids]
    changed[0] = (changed[0] + 1) % 256
    losses = []
    for ids in (row.input_ids, changed):
        tail = PackedWindow(ids, row.position_ids, [0], 0)
        with torch.no_grad():
            batch = torch.tensor([tail.input_ids]), torch.tensor([tail.position_ids])
            hidden = model.get_base_model().get_decoder()(
                input_ids=batch[0], position_ids=batch[1], attention_mask=torch.ones_like(batch[0]), use_cache=False
            )
            losses.append((float(SummedLoss(model)(*batch)), hidden.last_hidden_state[0, gap:]))
    assert losses[0][0] != losses[1][0]
    assert float((losses[0][1] - losses[1][1]).abs().max()) > 1e-4


def test_gradients_are_clipped_to_the_asked_norm_and_reported_unclipped() -> None:
    free, gradient = one_step(adapted_model(), windows(2))
    clipped, smaller = one_step(adapted_model(), windows(2), max_grad_norm=0.01)
    assert free.grad_norm == pytest.approx(norm(gradient), rel=1e-4)
    assert free.grad_norm > 0.1
    assert clipped.grad_norm == pytest.approx(free.grad_norm, rel=1e-6)
    assert norm(smaller) == pytest.approx(0.01, rel=1e-3)


class ReadNumbers(TorchDispatchMode):
    """Counts the numbers (not truth values) that the host reads from tensors one by one, waiting for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.bool:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_single_number_from_the_device() -> None:
    model = adapted_model()
    with ReadNumbers() as read:
        torch.ones(1).item()
        assert read.count == 1
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        wrapped, optimizer = accelerator.prepare(SummedLoss(model), optimizer)
        result = run_step(accelerator, wrapped, optimizer, windows(4), 2, 1.0)
    assert result.loss > 0
    assert read.count == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["lora_A", "lm_head"])
def test_a_non_finite_value_stops_before_any_parameter_changes(value: float, place: str) -> None:
    model = adapted_model()
    name, spoiled = next((name, p) for name, p in model.named_parameters() if place in name)
    with torch.no_grad():
        spoiled.view(-1)[3] = value
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with pytest.raises(DivergedError, match="not finite") as caught:
        one_step(model, windows(2))
    assert exit_code_of(caught.value) == 5
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[key].nan_to_num()), (name, key)
        assert parameter.grad is None


def test_divergence_leaves_the_last_checkpoint_untouched_and_says_exit_code_5(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    # The text has no digits: this weight spoils nothing until the first window with a fact.
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[byte_tokenizer()("7").input_ids[0]] = math.inf
    with quiet():
        model.save_pretrained(tmp_path / "models" / "tiny")
    recipe = job.recipe(
        "data.facts.share=0.2", "train.checkpoint_every=1", "train.windows_per_step=1", "train.steps=30"
    )
    seen: list[tuple[Path, str]] = []

    def remember(metrics: Any) -> None:
        seen[:] = [(path, sha256_file(path)) for path in (job.output / "checkpoints").rglob("*.safetensors")]

    with pytest.raises(DivergedError) as caught:
        extend(recipe, SilentReporter(on_step=remember), last_stage="train")
    assert exit_code_of(caught.value) == 5
    status = json.loads((job.output / "status.json").read_text())
    assert status["exit_code"] == 5
    assert "not finite" in status["reason"]
    steps = sorted((job.output / "checkpoints").iterdir())
    assert steps
    for folder in steps:
        verify_manifest(folder)
    assert all(sha256_file(path) == digest for path, digest in seen)
    assert not (job.output / "adapter").exists()


def test_the_learning_rate_rises_over_the_warmup_and_falls_like_a_cosine_to_zero() -> None:
    rates = [learning_rate_at(step, 100, 0.01, 0.05) for step in range(100)]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert max(rates) == rates[4]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[5:]))
    assert rates[5] == pytest.approx(0.01)
    assert rates[52] == pytest.approx(0.005, rel=0.02)  # half way down, half the peak
    assert 0 < rates[99] < 1e-5
    assert learning_rate_at(100, 100, 0.01, 0.05) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("steps", "warmup", "expected"), [(1, 0.05, 1), (10, 0.01, 1), (20, 0.05, 1), (200, 0.05, 10)])
def test_warmup_takes_its_share_of_the_steps_and_at_least_one(steps: int, warmup: float, expected: int) -> None:
    rising = [learning_rate_at(step, steps, 1.0, warmup) for step in range(expected)]
    assert rising == pytest.approx([(number + 1) / expected for number in range(expected)])


def test_lora_is_on_every_linear_layer_but_the_head_and_the_base_is_frozen() -> None:
    for base in (tiny_model(), Qwen2ForCausalLM(Qwen2Config(**tiny_config().to_dict() | {"model_type": "qwen2"}))):
        linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
        model = add_lora(base, LoraBlock(rank=4), seed=0)
        adapted = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
        assert adapted == linear - {"lm_head"}
        assert len(adapted) == 14
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
        assert len(trainable) == 28
        assert num_trainable(model) == sum(p.numel() for n, p in model.named_parameters() if n in trainable)


def test_a_step_changes_lora_and_nothing_else() -> None:
    model = adapted_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one_step(model, windows(2))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


def test_lora_starts_as_an_exact_zero_whatever_the_global_random_state() -> None:
    base = tiny_model()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = base(ids).logits
        first = add_lora(base, LoraBlock(rank=4), seed=3)
        assert torch.equal(first(ids).logits, expected)
    torch.manual_seed(99)
    second = add_lora(tiny_model(), LoraBlock(rank=4), seed=3)
    for (name, one), (_, other) in zip(trained(first).items(), trained(second).items(), strict=True):
        assert torch.equal(one, other), name
