"""Isolated documents are computed as with the mask of all queries by all keys, without anything of that size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_windowed import REFUSING, SMALL, WINDOW, WITH_WINDOWS, LargestTensor, config_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from ctxext.errors import UnsupportedModelError
from ctxext.model.documents import (
    DOCUMENTS,
    Documents,
    cumulative_arguments,
    documents_attention,
    documents_mask,
    documents_of,
)
from ctxext.model.lora import add_lora
from ctxext.recipe.schema import LoraBlock

LENGTH = 5 * WINDOW
# Documents longer and shorter than the sliding window, of one token, and a row that is one document.
ROWS = ((50, 1, 69), (10, 80, 30), (LENGTH,))
IDS = torch.randint(3, 260, (len(ROWS), LENGTH), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in ROWS])
WITHOUT_WINDOWS = ("llama", "qwen2", "qwen3", "olmo2", "glm4", "gpt_neox", "phi", "stablelm", "granite", "qwen3_moe")
# Keys wider than values and values wider than keys.
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
DEEPSEEK = {"first_k_dense_replace": 2, "num_key_value_heads": 4, "head_dim": 8, **LATENT}
FAMILIES = ["narrow values", "wide values", *WITH_WINDOWS, *(f"{name} without windows" for name in WITHOUT_WINDOWS)]


def family(name: str) -> PreTrainedConfig:
    if name.endswith("values"):
        width = 8 if name == "narrow values" else 24
        return AutoConfig.for_model("deepseek_v3", **{**SMALL, **DEEPSEEK, "v_head_dim": width})
    plain = name.removesuffix(" without windows")
    return config_of(name) if plain == name else AutoConfig.for_model(plain, **SMALL)


def model(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)


def states_and_gradients(trained: Any, rows: slice = slice(None)) -> tuple[Tensor, dict[str, Tensor]]:
    decoder = (trained.get_base_model() if hasattr(trained, "peft_config") else trained).get_decoder()
    hidden = decoder(input_ids=IDS[rows], position_ids=POSITIONS[rows], use_cache=False).last_hidden_state
    (hidden * torch.linspace(-1.0, 1.0, hidden.shape[-1])).sum().backward()
    gradients = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
    return hidden.detach(), gradients


def assert_same(first: tuple[Tensor, dict[str, Tensor]], second: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(first[0], second[0], rtol=1e-5, atol=2e-5)
    assert first[1].keys() == second[1].keys()
    assert first[1]
    for name, gradient in first[1].items():
        scale = float(gradient.abs().max()) or 1.0
        torch.testing.assert_close(gradient / scale, second[1][name] / scale, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_states_and_gradients_are_those_of_the_mask(name: str) -> None:
    config = family(name)
    assert_same(states_and_gradients(model(config, "sdpa")), states_and_gradients(model(config, DOCUMENTS)))


@pytest.mark.parametrize("name", ["llama without windows", "gemma3_text"])
def test_adapters_and_activation_checkpoints_get_the_same_gradients(name: str) -> None:
    trained = []
    for attention in ("sdpa", DOCUMENTS):
        adapted = add_lora(model(family(name), attention), LoraBlock(rank=4), seed=0)
        generator = torch.Generator().manual_seed(1)
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        adapted.train()
        if attention == DOCUMENTS:
            adapted.get_base_model().activation_checkpointing_enable()
        trained.append(states_and_gradients(adapted))
    assert_same(*trained)


def test_a_row_of_a_batch_counts_as_it_does_alone() -> None:
    config = family("qwen3")
    together, _ = states_and_gradients(model(config, DOCUMENTS))
    for number in range(len(ROWS)):
        alone, _ = states_and_gradients(model(config, DOCUMENTS), slice(number, number + 1))
        torch.testing.assert_close(alone, together[number : number + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama without windows", "gemma3_text", "narrow values", "wide values"])
def test_nothing_of_all_queries_by_all_keys_is_made(name: str) -> None:
    length = 1024
    positions = torch.arange(length)[None] % 300
    ids = torch.zeros_like(positions)
    largest = {}
    for attention in ("sdpa", DOCUMENTS):
        with LargestTensor() as seen:
            decoder = model(family(name), attention).get_decoder()
            decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.sum().backward()
        largest[attention] = seen.elements
    assert largest["sdpa"] >= length**2
    assert largest[DOCUMENTS] < length**2 // 4


@pytest.mark.parametrize("name", ["llama without windows", "gemma3_text"])
def test_one_document_is_computed_as_ever_and_with_a_cache(name: str) -> None:
    config = family(name)
    ids = IDS[:1]
    ones = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(config, "sdpa").eval()(ids, attention_mask=ones).logits
        documents = model(config, DOCUMENTS).eval()
        torch.testing.assert_close(documents(ids, attention_mask=ones).logits, expected, rtol=1e-5, atol=2e-5)
        cache = DynamicCache(config=documents.config)
        documents(ids[:, :70], past_key_values=cache)
        rest = documents(ids[:, 70:], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected[:, 70:], rtol=1e-5, atol=2e-5)


def test_documents_are_told_as_lengths_and_as_cumulative_lengths() -> None:
    documents = documents_of(POSITIONS.diff(dim=-1) != 1)
    assert documents.rows == ROWS
    assert documents.longest == LENGTH
    assert documents.cumulative.tolist() == [0, 50, 51, 120, 130, 210, 240, 360]
    assert documents.cumulative.dtype == torch.int32
    arguments = cumulative_arguments(documents)
    assert arguments["cu_seq_lens_q"] is arguments["cu_seq_lens_k"] is documents.cumulative
    assert arguments["max_length_q"] == arguments["max_length_k"] == LENGTH


@pytest.mark.parametrize("model_type", REFUSING)
def test_what_changes_the_scores_is_refused(model_type: str) -> None:
    refused = model(config_of(model_type), "eager")
    refused.config._attn_implementation = DOCUMENTS
    with pytest.raises(UnsupportedModelError, match=REFUSING[model_type][1]):
        states_and_gradients(refused)


def test_a_mask_that_is_not_made_of_documents_is_refused() -> None:
    def mask(visible: Any) -> Tensor | Documents:
        return documents_mask(1, 12, 12, mask_function=visible, allow_is_causal_skip=False)

    def halves(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query // 6 == key // 6)

    found = mask(halves)
    assert isinstance(found, Documents)
    assert found.rows == ((6, 6),)
    with pytest.raises(UnsupportedModelError, match="documents"):
        mask(lambda b, h, q, k: halves(b, h, q, k) & (k != 7))  # a hole
    with pytest.raises(UnsupportedModelError, match="documents"):
        mask(lambda b, h, q, k: halves(b, h, q, k) | (k == 0))  # a token that all see
    with pytest.raises(UnsupportedModelError, match="documents"):
        mask(lambda b, h, q, k: q // 6 == k // 6)  # both directions


def test_padded_heads_keep_the_scale_of_their_own_width() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 30, dim, generator=generator) for dim in (8, 8, 24))
    documents = documents_of(torch.arange(29)[None] % 10 == 9)
    found, _ = documents_attention(torch.nn.Module(), query, key, value, documents)
    visible = torch.block_diag(*(torch.ones(10, 10, dtype=torch.bool).tril() for _ in range(3)))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible)
    torch.testing.assert_close(found, expected.transpose(1, 2))
