"""The loss without logits is the plain cross entropy, in value and gradient, with and without gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from peft import LoraConfig, get_peft_model
from support import tiny_model
from torch import Tensor

from ctxext.model import loss as loss_module
from ctxext.model.adaptation import adapt
from ctxext.model.logits import UNCHANGED, LogitChange
from ctxext.model.loss import IGNORE_INDEX, DecoderHead, summed_loss, token_losses
from ctxext.model.parts import causal_lm
from ctxext.recipe.schema import LoraBlock

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


@pytest.fixture(params=["whole", "chunks"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways with gradients: all logits at once where they are few, and chunks."""
    name: str = request.param
    if name == "chunks":
        monkeypatch.setattr(loss_module, "_WHOLE_LOGITS", 0)
    return name


# 1024 is the size of a chunk.
@pytest.mark.parametrize("num_tokens", [1, 7, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_plain_cross_entropy(num_tokens: int, bias: bool, path: str) -> None:
    hidden, head, targets = make(num_tokens, bias=bias)
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


@pytest.mark.parametrize("loss", [lambda *parts: token_losses(*parts).sum(), summed_loss])
def test_a_frozen_head_gets_no_gradient(path: str, loss: Callable[..., Tensor]) -> None:
    hidden, head, targets = make(100)
    head.requires_grad_(False)
    leaf = hidden.clone().requires_grad_()
    loss(leaf, head, targets).backward()
    assert head.weight.grad is None
    assert leaf.grad is not None
    assert leaf.grad[targets == IGNORE_INDEX].abs().max() == 0


@pytest.mark.parametrize("num_tokens", [0, 1, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("change", [UNCHANGED, LogitChange(factor=1.5, divisor=4.0, soft_cap=3.0, vocab_size=V - 9)])
@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
def test_the_sum_has_the_value_and_gradients_of_the_plain_sum(
    num_tokens: int, change: LogitChange, trained: str, path: str
) -> None:
    hidden, head, targets = make(num_tokens, bias=True)
    targets = targets.clamp(max=V - 10)
    head.requires_grad_(trained != "hidden")
    results = []
    for loss_of in (lambda *parts: token_losses_plain(*parts).sum(), summed_loss):
        leaf = hidden.clone().requires_grad_(trained != "head")
        head.zero_grad()
        loss = loss_of(leaf, head, targets, change)
        (loss * 0.25).backward()  # what comes from above is no one
        results.append((loss.detach(), leaf.grad, head.weight.grad, head.bias.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert results[1][0].dtype == torch.float32


def token_losses_plain(hidden: Tensor, head: torch.nn.Linear, targets: Tensor, change: LogitChange) -> Tensor:
    return F.cross_entropy(change(head(hidden)), targets, reduction="none", ignore_index=IGNORE_INDEX)


def test_a_trained_head_tied_to_the_embedding_gets_the_gradient_of_both_uses(path: str) -> None:
    gradients = []
    for summed in (False, True):
        model = tiny_model(tie_word_embeddings=True)
        ids = torch.arange(80).view(2, 40)
        parts = DecoderHead(model)
        hidden, targets = parts.hidden_states(ids, use_cache=False).flatten(0, 1), ids.flatten().roll(-1)
        plain_sum = F.cross_entropy(parts.head(hidden), targets, reduction="sum")
        (parts.summed_loss(hidden, targets) if summed else plain_sum).backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_trains_in_float32_on_a_bfloat16_base_gets_its_gradient(tied: bool, path: str) -> None:
    gradients = []
    for summed in (False, True):
        base = tiny_model(tie_word_embeddings=tied).bfloat16()
        model = adapt(base, "lora", LoraBlock(rank=2, embeddings_and_norms=True), seed=0)
        parts, ids = DecoderHead(causal_lm(model)), torch.arange(80).view(2, 40)
        hidden, targets = parts.hidden_states(ids, use_cache=False).flatten(0, 1), ids.flatten().roll(-1)
        plain_sum = F.cross_entropy(parts.head(hidden).float(), targets, reduction="sum")
        (parts.summed_loss(hidden, targets) if summed else plain_sum).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert sum("embed" in name or "lm_head" in name for name in gradients[0]) == (1 if tied else 2)
    for name, expected in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert float((gradients[1][name] - expected).norm()) <= 0.02 * float(expected.norm()), name


def test_an_adapter_on_the_head_counts(path: str) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    parts = DecoderHead(model.get_base_model())
    hidden, targets = torch.randn(30, 32), torch.arange(30)
    for loss in (parts.token_losses(hidden, targets).sum(), parts.summed_loss(hidden, targets)):
        torch.testing.assert_close(loss, F.cross_entropy(parts.head(hidden), targets, reduction="sum"))
        model.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora" in n)


def test_the_sum_over_many_chunks_of_a_half_precision_head_does_not_round_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_module, "_WHOLE_LOGITS", 0)
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", 8)
    hidden, head, targets = make(4000)
    half_head, half = copy.deepcopy(head).bfloat16(), hidden.bfloat16()
    exact = copy.deepcopy(half_head).float()
    F.cross_entropy(exact(half.float()), targets, reduction="sum").backward()
    loss = summed_loss(half, half_head, targets)
    loss.backward()
    assert half_head.weight.grad is not None
    assert exact.weight.grad is not None
    assert loss.dtype == torch.float32
    error = (half_head.weight.grad.float() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert error < 4e-3  # one rounding to bfloat16; rounded 500 times it is 3e-2


def test_a_value_that_is_not_finite_at_an_ignored_position_spoils_nothing_else(path: str) -> None:
    hidden, head, targets = make(10)
    hidden[0] = torch.inf  # whose target is ignored
    loss = summed_loss(hidden.requires_grad_(), head.requires_grad_(False), targets)
    loss.backward()
    assert torch.isfinite(loss)
    assert hidden.grad is not None
    assert hidden.grad[1:].isfinite().all()


def test_a_second_backward_pass_fails_instead_of_scaling_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_WHOLE_LOGITS", 0)
    hidden, head, targets = make(10)
    loss = summed_loss(hidden.requires_grad_(), head, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


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

    def spy(hidden: Tensor, *others: Any) -> Tensor:
        seen.append(len(hidden))
        return real(hidden, *others)

    monkeypatch.setattr(loss_module, "_chunk_losses", spy)
    hidden, head, targets = make(3000)
    with torch.no_grad():
        token_losses(hidden, head, targets)
    assert seen == [1024, 1024, 952]
    monkeypatch.setattr(loss_module, "_WHOLE_LOGITS", 0)
    sizes: list[int] = []
    head.register_forward_hook(lambda module, given, logits: sizes.append(len(logits)))
    summed_loss(hidden.requires_grad_(), head, targets).backward()
    assert sizes == [1024, 1024, 952]  # and each chunk once: nothing is computed again on the way back


def test_decoder_and_head_give_the_models_own_logits() -> None:
    model = tiny_model()
    ids = torch.arange(40)[None]
    parts = DecoderHead(model)
    with torch.no_grad():
        logits = parts.head(parts.hidden_states(ids, use_cache=False))
        torch.testing.assert_close(logits, model(ids).logits)
