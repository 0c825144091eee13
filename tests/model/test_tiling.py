"""Tiles change neither loss nor gradients, on every kind of decoder layer, and can be taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ctxext.model.lora import add_lora
from ctxext.model.tiling import tile_modules, tiled, untile_modules
from ctxext.recipe.schema import LoraBlock
from ctxext.train.step import SummedLoss

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
# Tiled modules in a layer: norms, MLP or experts, and four linear layers of the attention (Phi 3 has two).
FAMILIES: list[tuple[PreTrainedConfig, int]] = [
    (LlamaConfig(**SHAPE), 7),
    (Qwen3Config(**SHAPE, head_dim=8), 9),
    (Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=16), 11),
    (Phi3Config(**SHAPE), 5),
    (MixtralConfig(**SHAPE, **EXPERTS, num_local_experts=4), 7),
    (Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts=4, moe_intermediate_size=16), 9),
]
LENGTH = 70  # no multiple of the tiles below


def trained_model(config: PreTrainedConfig, dropout: float = 0.0) -> Any:
    """A random model with LoRA whose second factor is not zero, so that every gradient is not zero either."""
    torch.manual_seed(0)
    wrapped = add_lora(AutoModelForCausalLM.from_config(config), LoraBlock(rank=4, dropout=dropout), 0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


def loss_and_gradients(model: Any, batch: int = 2) -> tuple[float, dict[str, Tensor]]:
    """Of one pass over fixed tokens."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    ids = torch.randint(2, 96, (batch, LENGTH))
    loss = SummedLoss(model)(ids, torch.arange(LENGTH).expand(batch, -1))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9)


@pytest.mark.parametrize(("config", "per_layer"), FAMILIES, ids=lambda value: getattr(value, "model_type", ""))
def test_tiles_give_the_same_loss_and_gradients(config: PreTrainedConfig, per_layer: int) -> None:
    model = trained_model(config)
    plain = loss_and_gradients(model)
    names = tile_modules(model, 32)
    assert len(names) == 2 * per_layer + 1  # and the last norm
    assert_same(loss_and_gradients(model), plain)
    model.get_base_model().activation_checkpointing_enable()
    assert_same(loss_and_gradients(model), plain)
    untile_modules(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_held_is_one_tile() -> None:
    model = trained_model(LlamaConfig(**SHAPE))
    tile_modules(model, 32)
    seen: list[int] = []
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.act_fn.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    loss_and_gradients(model, batch=2)
    # 32 tokens are 16 of each of the two rows; forward, and once more for the gradients.
    assert seen == [16, 16, 16, 16, 6] * 2


def test_dropout_is_the_same_in_both_passes() -> None:
    """Without the first pass's random numbers the gradient would belong to another function than the loss."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8, bias=False))
    x = torch.randn(64, 8, dtype=torch.float32, requires_grad=True)
    result = tiled(layer, 16, x, parameters=[*layer.parameters()], draws_random_numbers=True)
    (gradient,) = torch.autograd.grad(result.sum(), x, retain_graph=True)
    dropped = gradient == 0
    assert 0.3 < dropped.float().mean() < 0.7
    # What was dropped in the forward pass has no gradient, and nothing else: the function is linear in the rest.
    torch.testing.assert_close((x * gradient).sum(), result.sum())


def test_random_numbers_after_the_backward_pass_are_as_without_tiles() -> None:
    states = []
    for tile in (0, 16):
        model = trained_model(LlamaConfig(**SHAPE), dropout=0.1)
        if tile:
            tile_modules(model, tile)
        torch.manual_seed(3)
        ids = torch.arange(2, 66)[None]
        loss = SummedLoss(model)(ids, torch.arange(64)[None])
        before = torch.get_rng_state()
        loss.backward()
        states.append(before.equal(torch.get_rng_state()))
    assert states == [True, True]


def test_autocast_is_repeated_in_the_backward_pass() -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(64, 8, requires_grad=True)
    results = []
    for tokens in (64, 16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = tiled(layer, tokens, x, parameters=[*layer.parameters()])
        results.append((result, *torch.autograd.grad(result.float().square().sum(), [x, layer.weight])))
        assert result.dtype == torch.bfloat16
    for plain, in_tiles in zip(*results, strict=True):
        torch.testing.assert_close(in_tiles, plain, rtol=2e-2, atol=2e-2)


def test_without_gradients_nothing_is_cut() -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x

    with torch.no_grad():
        tiled(function, 2, torch.zeros(8, 2), parameters=[])
    assert calls == [8]


def test_arguments_of_another_length_reach_every_tile_whole() -> None:
    scale, x = torch.tensor([2.0, 3.0]), torch.randn(10, 2, requires_grad=True)
    result = tiled(lambda x, scale, power: (x * scale) ** power, 3, x, scale, parameters=[], power=2)
    torch.testing.assert_close(result, (x * scale) ** 2)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), x)[0], 2 * x * scale**2)
