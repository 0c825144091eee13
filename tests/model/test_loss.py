"""The loss without logits is the plain cross entropy, in value and gradient, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from support import tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PreTrainedConfig,
)

from ctxext.errors import UnsupportedModelError
from ctxext.model import loss as loss_module
from ctxext.model.loss import IGNORE_INDEX, DecoderHead, token_losses

D, V = 24, 301


def make(num_tokens: int, *, bias: bool = False, seed: int = 0) -> tuple[Tensor, torch.nn.Linear, Tensor]:
    """Hidden states, head and targets, a fifth of the targets ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, D, generator=generator)
    head = torch.nn.Linear(D, V, bias=bias)
    torch.nn.init.normal_(head.weight, std=0.5, generator=generator)
    targets = torch.randint(0, V, (num_tokens,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden, head, targets


def plain(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), targets, reduction="none", ignore_index=IGNORE_INDEX)


@pytest.fixture(params=["fused", "chunked"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways with gradients: torch's fused loss, and chunks with checkpoints (older torch, heads with a bias)."""
    name: str = request.param
    if name == "chunked":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    return name


# 1024 is the size of a chunk.
@pytest.mark.parametrize("num_tokens", [1, 7, 1023, 1024, 1025, 2500])
def test_values_and_gradients_equal_plain_cross_entropy(num_tokens: int, path: str) -> None:
    hidden, head, targets = make(num_tokens)
    weights = torch.linspace(0.5, 2.0, num_tokens)
    results = []
    for losses_of in (plain, token_losses):
        leaf = hidden.clone().requires_grad_()
        losses = losses_of(leaf, head, targets)
        head.weight.grad = None
        (losses * weights).sum().backward()
        results.append((losses.detach(), leaf.grad, head.weight.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    assert results[1][0].dtype == torch.float32
    assert (results[1][0][targets == IGNORE_INDEX] == 0).all()


@pytest.mark.parametrize("num_tokens", [7, 1024, 2500])
def test_the_path_without_gradients_gives_the_same_values(num_tokens: int, path: str) -> None:
    hidden, head, targets = make(num_tokens)
    with_gradients = token_losses(hidden, head, targets).detach()
    with torch.no_grad():
        without = token_losses(hidden, head, targets)
        torch.testing.assert_close(without, plain(hidden, head, targets), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(without, with_gradients, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient(path: str) -> None:
    hidden, head, targets = make(100)
    head.requires_grad_(False)
    leaf = hidden.clone().requires_grad_()
    token_losses(leaf, head, targets).sum().backward()
    assert head.weight.grad is None
    assert leaf.grad is not None
    assert leaf.grad[targets == IGNORE_INDEX].abs().max() == 0


def test_a_bias_of_the_head_counts() -> None:
    hidden, head, targets = make(50, bias=True)
    leaf = hidden.clone().requires_grad_()
    torch.testing.assert_close(token_losses(leaf, head, targets), plain(leaf, head, targets))


def test_half_precision_sums_in_float32(path: str) -> None:
    hidden, head, targets = make(4000)
    expected = plain(hidden.bfloat16().float(), head.bfloat16().float(), targets).sum()
    head = head.bfloat16()
    losses = token_losses(hidden.bfloat16().requires_grad_(), head, targets)
    assert losses.dtype == torch.float32
    assert abs(losses.sum() / expected - 1) < 1e-3


def test_all_targets_ignored_is_a_loss_of_zero(path: str) -> None:
    hidden, head, targets = make(10)
    assert token_losses(hidden.requires_grad_(), head, torch.full_like(targets, IGNORE_INDEX)).sum() == 0


def test_the_logits_of_a_whole_window_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real: Callable[..., Tensor] = loss_module._chunk_losses

    def spy(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        return real(hidden, head, targets)

    monkeypatch.setattr(loss_module, "_chunk_losses", spy)
    hidden, head, targets = make(3000)
    with torch.no_grad():
        token_losses(hidden, head, targets)
    assert seen == [1024, 1024, 952]


def test_decoder_and_head_give_the_models_own_logits() -> None:
    model = tiny_model()
    ids = torch.arange(40)[None]
    parts = DecoderHead(model)
    with torch.no_grad():
        logits = parts.head(parts.hidden_states(ids, use_cache=False))
        torch.testing.assert_close(logits, model(ids).logits)


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CHANGED_LOGITS: dict[str, PreTrainedConfig] = {
    "final_logit_softcapping": Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=30.0),
    "logit_scale": CohereConfig(**SIZES, logit_scale=0.0625),
    "logits_scaling": GraniteConfig(**SIZES, logits_scaling=8.0),
}


@pytest.mark.parametrize(("key", "config"), CHANGED_LOGITS.items())
def test_heads_that_change_their_logits_are_refused(key: str, config: PreTrainedConfig) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"config\.{key}"):
        DecoderHead(AutoModelForCausalLM.from_config(config))


def test_a_scale_of_one_changes_nothing_and_is_accepted() -> None:
    DecoderHead(AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, logits_scaling=1.0)))
