"""What a mixture-of-experts model's class adds to its loss is added to ours, value and gradient, and reported apart."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rope.tiny_families import build, tiny_family_config
from support import byte_tokenizer, make_job
from torch import Tensor, nn

from ctxext.data.packing import PackedWindow
from ctxext.errors import UsageError
from ctxext.model.lora import add_lora
from ctxext.model.parts import causal_lm
from ctxext.model.routers import auxiliary_coefficient, check_routers, modules_with_router_logits, routers_of
from ctxext.model.savings import Savings, apply_savings
from ctxext.model.tiling import tile_modules
from ctxext.recipe.schema import LoraBlock, TrainBlock
from ctxext.train.step import SummedLoss, run_step

LENGTH = 24
# Every causal family whose class adds an auxiliary loss, where a tiny model can be built.
WITH_LOSS = (
    "deepseek_v4",
    "doge",
    "ernie4_5_moe",
    "flex_olmo",
    "flint",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "jamba",
    "jetmoe",
    "laguna",
    "mellum",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp_text",
)
# Tiny models of these have no routers otherwise.
_CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"]},
    "doge": {"is_moe": True},
    "flint": {"mlp_only_layers": []},
}
# Balanced by a bias, or by nothing in their class.
WITHOUT_LOSS = ("deepseek_v3", "deepseek_v2", "glm4_moe", "dots1", "hunyuan_v1_moe", "llama4_text", "afmoe", "zaya")


def windows(count: int) -> list[PackedWindow]:
    rng = random.Random(3)
    return [PackedWindow([rng.randrange(90) for _ in range(LENGTH)], list(range(LENGTH)), [0], 0) for _ in range(count)]


def adapted(family: str, coefficient: float | None = 0.5) -> Any:
    """A tiny model whose LoRA is not at its start any more."""
    config = tiny_family_config(family, **_CHANGES.get(family, {}))
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if getattr(config, name, None) is not None and coefficient is not None:
            setattr(config, name, coefficient)
    if family in ("deepseek_v4", "jetmoe"):  # peft finds no linear layer there that it can adapt
        return build(config).train()
    model = add_lora(build(config), LoraBlock(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.train()
    return model


def batch(rows: list[PackedWindow]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([row.input_ids for row in rows]),
        "position_ids": torch.tensor([row.position_ids for row in rows]),
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).abs().max()) < 1e-4 * largest, name


def own_loss(model: nn.Module, rows: list[PackedWindow]) -> tuple[Tensor, Tensor]:
    """The loss of the model's own class, and its auxiliary part."""
    inputs = batch(rows)
    mask = torch.ones_like(inputs["input_ids"])
    base: Any = causal_lm(model)
    torch.manual_seed(5)
    output = base(**inputs, attention_mask=mask, labels=inputs["input_ids"], use_cache=False, output_router_logits=True)
    return output.loss, output.aux_loss


@pytest.mark.parametrize("family", WITH_LOSS)
def test_loss_and_gradient_are_those_of_the_models_own_class(family: str) -> None:
    model, rows = adapted(family), windows(2)
    theirs, auxiliary = own_loss(model, rows)
    theirs.backward()
    expected = gradients(model)
    model.zero_grad()
    objective, num_targets = SummedLoss(model), 2 * (LENGTH - 1)
    torch.manual_seed(5)
    ours = objective(**batch(rows)) / num_targets
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert objective.parts is not None
    token_loss, weighted = (objective.parts / num_targets).tolist()
    assert weighted == pytest.approx(float(auxiliary.detach()), rel=1e-5)
    assert token_loss == pytest.approx(float(theirs.detach()) - 0.5 * float(auxiliary.detach()), rel=1e-4)
    assert weighted > 0.1
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("family", WITHOUT_LOSS)
def test_a_class_without_an_auxiliary_loss_gets_none(family: str) -> None:
    model = adapted(family, None)
    assert routers_of(model)
    assert auxiliary_coefficient(causal_lm(model)) is None
    objective = SummedLoss(model)
    assert not objective.has_auxiliary_loss
    with pytest.raises(UsageError, match=r"train\.router_loss: the model's class has no auxiliary loss"):
        check_routers(causal_lm(model), TrainBlock(router_loss=0.1))


def test_no_causal_family_with_an_auxiliary_loss_is_missing_here() -> None:
    import re
    from pathlib import Path

    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = Path(transformers.__file__).parent / "models"
    sources = {path.parent.name: path.read_text() for path in folder.glob("*/modeling_*.py")}
    classes = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    adding = {
        name
        for name, text in sources.items()
        if re.search(r"loss \+= self\.(router_)?aux_loss_coef \* aux_loss", text)
        and any(f"class {one}(" in text for one in classes)
    }
    known = {name.removesuffix("_text") for name in WITH_LOSS}
    assert adding - known == {"dbrx"}  # of which no tiny model can be built


@pytest.mark.parametrize("savings", [Savings(1), Savings(2), Savings(None, tile_tokens=16), Savings(1, tile_tokens=16)])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "phimoe", "llama4_text"])
def test_savings_keep_the_gradient_of_the_auxiliary_loss(family: str, savings: Savings) -> None:
    found = []
    for saved in (False, True):
        model = adapted(family)
        if saved:
            apply_savings(model, savings)
        torch.manual_seed(5)
        loss = SummedLoss(model)(**batch(windows(2)))
        loss.backward()
        found.append((float(loss.detach()), gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_same(found[1][1], found[0][1])


@pytest.mark.parametrize("family", [*WITH_LOSS, *WITHOUT_LOSS])
def test_tiles_leave_routers_alone_and_logits_as_they_are(family: str) -> None:
    model = adapted(family, None).eval()
    inputs = batch(windows(1))
    expected = model(**inputs, use_cache=False).logits.detach()
    inside = {router.module for router in modules_with_router_logits(model)}
    assert inside
    tiled = tile_modules(model, 8)
    modules = dict(model.named_modules())
    assert not any(inside & set(modules[name].modules()) for name in tiled)
    assert any("norm" in name for name in tiled)
    assert any(name.endswith("experts") for name in tiled) != (family in ("doge", "jetmoe", "llama4_text", "dbrx"))
    logits = model(**inputs, use_cache=False).logits  # with gradients: without, nothing is cut
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-4)
    logits.sum().backward()


def one_step(model: nn.Module, rows: list[PackedWindow], per_device: int, router_loss: float | None = None) -> Any:
    """Plain gradient descent with rate 1, so that the change of a weight *is* its gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    wrapped, optimizer = accelerator.prepare(SummedLoss(model, router_loss), optimizer)
    result = run_step(accelerator, wrapped, optimizer, rows, per_device, 1e9)
    after = dict(model.named_parameters())
    return result, {name: old - after[name].detach() for name, old in before.items()}


def test_accumulation_gives_the_mean_of_the_passes_auxiliary_losses_and_the_same_token_loss() -> None:
    rows = windows(4)
    whole, _ = one_step(adapted("mixtral"), rows, 4)
    split, gradient = one_step(adapted("mixtral"), rows, 1)
    assert split.loss == pytest.approx(whole.loss, abs=1e-6)
    model = adapted("mixtral")
    own = [own_loss(model, [row]) for row in rows]
    assert split.auxiliary_loss == pytest.approx(sum(float(part.detach()) for _, part in own) / 4, rel=1e-5)
    assert split.auxiliary_loss != pytest.approx(whole.auxiliary_loss, rel=1e-4)  # depends on what passes together
    sum(loss for loss, _ in own).div(4).backward()  # type: ignore[union-attr]
    assert_same(gradient, gradients(model))


def test_without_the_auxiliary_loss_accumulation_changes_nothing() -> None:
    rows = windows(4)
    (whole, expected), (split, gradient) = (one_step(adapted("mixtral"), rows, n, 0.0) for n in (4, 1))
    assert split.loss == pytest.approx(whole.loss, abs=1e-6)
    assert whole.auxiliary_loss is None
    assert_same(gradient, expected)


def test_a_coefficient_of_the_recipe_goes_before_the_models_own() -> None:
    rows = windows(2)
    losses = {}
    for coefficient in (None, 0.5, 2.0):
        objective = SummedLoss(adapted("mixtral", 0.5), coefficient)
        losses[coefficient] = float(objective(**batch(rows)).detach())
    assert objective.parts is not None
    token_loss, auxiliary = objective.parts.tolist()
    assert losses[None] == losses[0.5] == pytest.approx(token_loss + 0.5 * auxiliary, rel=1e-6)
    assert losses[2.0] == pytest.approx(token_loss + 2.0 * auxiliary, rel=1e-6)


def test_settings_for_routers_of_dense_models_are_refused_before_weights_are_loaded(tmp_path: Any) -> None:
    from ctxext.planning.plan import make_plan

    job = make_job(tmp_path)
    make_plan(job.recipe("train.router_loss=0"))
    with pytest.raises(UsageError, match=r"train\.router_loss"):
        make_plan(job.recipe("train.router_loss=0.01"))
    with pytest.raises(UsageError, match=r"train\.router_jitter: the model has no routers"):
        make_plan(job.recipe("train.router_jitter=0.01"))


def test_what_passes_together_changes_results_where_routers_are_balanced_over_it(tmp_path: Any) -> None:
    from ctxext.planning.plan import make_plan
    from ctxext.recipe.effects import differences

    job = make_job(tmp_path)
    config = tiny_family_config("mixtral", vocab_size=260, bos_token_id=None, eos_token_id=256, pad_token_id=None)
    build(config).save_pretrained(tmp_path / "mixture")
    byte_tokenizer().save_pretrained(tmp_path / "mixture")
    found = {}
    for name, settings in {
        "balanced": [f"model.source={tmp_path / 'mixture'}"],
        "not balanced": [f"model.source={tmp_path / 'mixture'}", "train.router_loss=0"],
        "dense": [],
    }.items():
        one, two = (make_plan(job.recipe(*settings, f"train.windows_per_device={n}")).decides for n in (1, 2))
        found[name] = [(d.key, d.stored, d.new, d.effect) for d in differences(one, two)]
    last_bits = [("train.windows_per_device", 1, 2, "last-bits")]
    assert found == {
        "balanced": [("windows-balanced-together", 1, 2, "results")],
        "not balanced": last_bits,
        "dense": last_bits,
    }
