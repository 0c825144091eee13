"""In a skip-wise window everything before the gap still counts, and attention runs its causal kernel without a mask.

transformers takes a jump in the positions for a document boundary when it gets no mask at all, and hides everything
before the jump. The training step therefore passes a mask of ones. The last test documents the trap itself: when it
fails, upstream has changed and the mask may no longer be needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from peft import PeftModel
from support import tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM

from ctxext.model.documents import DOCUMENTS
from ctxext.model.lora import add_lora
from ctxext.recipe.schema import LoraBlock
from ctxext.rope.patchers import extend_config
from ctxext.train.step import SummedLoss

CUT, LENGTH, TARGET = 20, 48, 512
IDS = torch.arange(5, 5 + LENGTH)[None]
CONSECUTIVE = torch.arange(LENGTH)[None]
SKIP_WISE = torch.cat([torch.arange(CUT), torch.arange(CUT, LENGTH) + 300])[None]

every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager", DOCUMENTS])


def model_with_lora(attention: str) -> PeftModel:
    config = extend_config(tiny_config(), target_length=TARGET)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = add_lora(LlamaForCausalLM(config), LoraBlock(rank=4), seed=0)
    # LoRA begins as an identity; trained weights are what the step sees.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@dataclass
class Seen:
    """What passed through a forward pass: embeddings (a leaf, once asked to be one) and last hidden states."""

    embeddings: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(model: PeftModel, perturbation: Tensor | None = None) -> Iterator[Seen]:
    decoder = model.get_base_model().get_decoder()
    seen = Seen()

    def on_embeddings(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.detach().clone()
        if perturbation is not None:
            output += perturbation
        seen.embeddings.append(output.requires_grad_())
        return output

    handles = [
        decoder.get_input_embeddings().register_forward_hook(on_embeddings),
        decoder.norm.register_forward_hook(lambda module, args, output: seen.hidden.append(output)),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def influences(seen: Seen) -> Tensor:
    """[S]: norm of the gradient of the last token's hidden state with respect to each token's embedding."""
    # A fixed direction: the norm makes the plain sum of a hidden state nearly constant.
    direction = torch.linspace(-1.0, 1.0, seen.hidden[0].shape[-1])
    (gradient,) = torch.autograd.grad((seen.hidden[0][0, -1] * direction).sum(), seen.embeddings[0])
    return gradient[0].norm(dim=-1)


def step_influences(model: PeftModel, positions: Tensor) -> Tensor:
    """Influences in a pass as the training step makes it."""
    with watched(model) as seen:
        SummedLoss(model)(IDS, positions)
    return influences(seen)


def decoder_influences(model: PeftModel, positions: Tensor, mask: Tensor | None) -> Tensor:
    """Influences in a pass with a mask of our own, or none."""
    with watched(model) as seen:
        decoder = model.get_base_model().get_decoder()
        decoder(input_ids=IDS, position_ids=positions, attention_mask=mask, use_cache=False)
    return influences(seen)


def causal_mask() -> Tensor:
    """[1, 1, S, S] additive: everything before a token is visible, whatever its position says."""
    hidden = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
    return hidden[None, None]


@every_attention
def test_tokens_before_the_gap_influence_the_last_token(attention: str) -> None:
    influence = step_influences(model_with_lora(attention), SKIP_WISE)
    assert (influence[:CUT] > 1e-4).all()
    assert (influence[CUT:] > 1e-4).all()


@every_attention
@pytest.mark.parametrize("positions", [CONSECUTIVE, SKIP_WISE], ids=["full-length", "skip-wise"])
def test_the_influence_is_that_of_an_explicit_causal_mask(attention: str, positions: Tensor) -> None:
    model = model_with_lora(attention)
    # What makes its own masks takes none.
    expected = decoder_influences(model_with_lora(attention.replace(DOCUMENTS, "sdpa")), positions, causal_mask())
    torch.testing.assert_close(step_influences(model, positions), expected, rtol=1e-4, atol=1e-6)


def test_both_attentions_agree() -> None:
    torch.testing.assert_close(
        step_influences(model_with_lora("sdpa"), SKIP_WISE),
        step_influences(model_with_lora("eager"), SKIP_WISE),
        rtol=1e-4,
        atol=1e-6,
    )


@every_attention
def test_a_changed_first_chunk_changes_the_last_token(attention: str) -> None:
    model = model_with_lora(attention)
    perturbation = torch.zeros(1, LENGTH, model.config.hidden_size)
    perturbation[:, :CUT] = torch.randn(CUT, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    last = []
    for change in (None, perturbation):
        with watched(model, change) as seen, torch.no_grad():
            SummedLoss(model)(IDS, SKIP_WISE)
        last.append(seen.hidden[0][0, -1])
    assert (last[0] - last[1]).abs().max() > 1e-2


@every_attention
def test_later_tokens_never_influence_earlier_ones(attention: str) -> None:
    model = model_with_lora(attention)
    with watched(model) as seen:
        SummedLoss(model)(IDS, SKIP_WISE)
    (gradient,) = torch.autograd.grad(seen.hidden[0][0, CUT + 3].square().sum(), seen.embeddings[0])
    assert gradient[0, CUT + 4 :].abs().max() == 0


@pytest.mark.parametrize("positions", [CONSECUTIVE, SKIP_WISE], ids=["full-length", "skip-wise"])
def test_the_causal_kernel_gets_no_mask(positions: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    real = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **arguments: Any) -> Tensor:
        calls.append({"attn_mask": attn_mask, **arguments})
        return real(query, key, value, attn_mask=attn_mask, **arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = model_with_lora("sdpa")
    SummedLoss(model)(IDS, positions).backward()
    assert len(calls) == model.config.num_hidden_layers
    for call in calls:
        assert call["attn_mask"] is None
        assert call["is_causal"] is True


@every_attention
def test_without_the_mask_of_ones_the_first_chunk_is_hidden(attention: str) -> None:
    model = model_with_lora(attention)
    influence = decoder_influences(model, SKIP_WISE, None)
    assert (influence[:CUT] == 0).all()
    assert (influence[CUT:] > 1e-4).all()
    assert (decoder_influences(model, CONSECUTIVE, None) > 1e-4).all()
