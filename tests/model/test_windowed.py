"""Windowed attention computes what `sdpa` and `eager` compute, without anything of [S, S], or refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from ctxext.errors import UnsupportedModelError
from ctxext.evaluation.answerer import Answerer
from ctxext.model.attention import running_kernels
from ctxext.model.windowed import WINDOWED, attention_for, supports_windowed, windowed_attention

WINDOW = 24
SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Model type -> what its config needs besides SMALL. Mistral's kind has windows in all layers, the others in one of two.
WITH_WINDOWS: dict[str, dict[str, Any]] = {
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 11},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, **EXPERTS},
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "qwen2": {**MIXED, "use_sliding_window": True},
    "qwen3": {**MIXED, "use_sliding_window": True, "num_key_value_heads": 1},
    "olmo3": MIXED,
    "cohere2": MIXED,
    "exaone4": MIXED,
    "ministral": MIXED,
}
REFUSING: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({**MIXED, "attn_logit_softcapping": 50.0}, "soft-capping"),
    "gpt_oss": ({**MIXED, **EXPERTS}, "attention sinks"),
}


def config_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    extra = WITH_WINDOWS.get(model_type) or REFUSING.get(model_type, ({},))[0]
    return AutoConfig.for_model(model_type, **{**SMALL, **extra, **changes})


def pair(config: PreTrainedConfig, reference: str = "sdpa") -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random model with the reference's and with windowed attention."""
    models = []
    for attention in (reference, WINDOWED):
        torch.manual_seed(0)
        # A copy each: the models keep their config, and the attention is an entry of it.
        models.append(AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval())
    assert [model.config._attn_implementation for model in models] == [reference, WINDOWED]
    return models[0], models[1]


def random_ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 260, (batch, length), generator=torch.Generator().manual_seed(length))


def assert_equal_logits(models: tuple[PreTrainedModel, PreTrainedModel], ids: Tensor, **arguments: Any) -> None:
    with torch.no_grad():
        expected, got = (model(ids, **arguments).logits for model in models)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", WITH_WINDOWS)
def test_families_equal_sdpa_and_the_window_matters(model_type: str) -> None:
    config = config_of(model_type)
    assert supports_windowed(config)
    models = pair(config)
    ids = random_ids(5 * WINDOW + 7)
    assert_equal_logits(models, ids)
    wider = pair(config_of(model_type, sliding_window=1000))[0]
    with torch.no_grad():
        difference = (wider(ids).logits - models[1](ids).logits).abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("reference", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("length", [1, 2, 64, 129, 333])
def test_any_length_and_window(reference: str, window: int, length: int) -> None:
    assert_equal_logits(pair(config_of("gemma3_text", sliding_window=window), reference), random_ids(length))


def test_a_model_without_windows_is_equal_too() -> None:
    assert_equal_logits(pair(tiny_config(num_attention_heads=4, num_key_value_heads=2)), random_ids(100))


def test_rows_of_a_batch_and_a_mask_of_ones() -> None:
    models = pair(config_of("gemma3_text"))
    assert_equal_logits(models, random_ids(101, batch=3))
    assert_equal_logits(models, random_ids(101, batch=3), attention_mask=torch.ones(3, 101, dtype=torch.long))


@pytest.mark.parametrize("sliding_cache", [True, False], ids=["cache cut to the window", "cache of all keys"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral"])
@pytest.mark.parametrize("pieces", [[5, 3, 30, 1, 1, 70, 1, 23, 24, 25, 1], [130, 130, 7], [23, 1, 1], [200, 2, 90]])
def test_pieces_with_a_cache_equal_the_whole(model_type: str, pieces: list[int], sliding_cache: bool) -> None:
    config = config_of(model_type)
    reference, windowed = pair(config)
    ids = random_ids(sum(pieces), batch=2)
    cache = DynamicCache(config=config) if sliding_cache else DynamicCache()
    with torch.no_grad():
        expected = reference(ids, use_cache=False).logits
        got = [windowed(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_pieces_of_a_full_layer_whose_mask_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxext.model.windowed._MASK_ELEMENTS", 700)
    test_pieces_with_a_cache_equal_the_whole("gemma3_text", [100, 60, 40], True)


@pytest.mark.parametrize("prompt", [7, WINDOW, 90])
@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral", "qwen2"])
def test_generates_the_same_tokens(model_type: str, prompt: int) -> None:
    ids = random_ids(prompt, batch=2)
    expected, got = (
        model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
        for model in pair(config_of(model_type))
    )
    assert got.shape[1] == prompt + 40
    assert got.tolist() == expected.tolist()


def test_the_evaluation_answers_the_same() -> None:
    class Tokenizer:
        eos_token_id = None

    ids = random_ids(150)[0].tolist()
    expected, got = (
        Answerer(model, Tokenizer(), chunk_tokens=64).answer(ids, 12) for model in pair(config_of("gemma3_text"))
    )
    assert got.ids == expected.ids
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-5, atol=1e-5)


def test_gradients_equal() -> None:
    ids = random_ids(150, batch=2)
    gradients = []
    for model in pair(config_of("gemma3_text")):
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                # Expanded views take no memory: only what strides reach counts.
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def largest(model: PreTrainedModel, ids: Tensor) -> int:
    with torch.no_grad(), LargestTensor() as seen:
        model(ids, use_cache=False, logits_to_keep=1)
    return seen.elements


def test_nothing_grows_with_the_square_of_the_length() -> None:
    reference, windowed = pair(config_of("gemma3_text"))
    assert largest(reference, random_ids(1024)) >= 1024**2
    half, whole = largest(windowed, random_ids(1024)), largest(windowed, random_ids(2048))
    assert whole < 2048**2 / 16
    assert whole <= 2 * half


def test_the_flash_kernel_runs_in_both_kinds_of_layers() -> None:
    _, windowed = pair(config_of("gemma3_text"))
    assert running_kernels(windowed, 100) == ["_scaled_dot_product_flash_attention_for_cpu"]


def refused(model: PreTrainedModel, match: str, ids: Tensor, **arguments: Any) -> None:
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=match):
        model(ids, **arguments)


@pytest.mark.parametrize("model_type", REFUSING)
def test_layers_that_change_the_scores_are_refused(model_type: str) -> None:
    config, match = config_of(model_type), REFUSING[model_type][1]
    refused(pair(config, "eager")[1], match, random_ids(40))


def test_padding_packed_documents_and_static_caches_are_refused() -> None:
    config = config_of("gemma3_text")
    model = pair(config)[1]
    ids = random_ids(40)
    for padded in (0, 39):
        mask = torch.ones_like(ids)
        mask[0, padded] = 0
        refused(model, "padding", ids, attention_mask=mask)
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    refused(model, "packed documents", ids, position_ids=positions, use_cache=False)
    refused(model, "static cache", ids, past_key_values=StaticCache(config=config, max_cache_len=64))


def test_attention_in_both_directions_and_chunks_is_refused() -> None:
    model = pair(config_of("gemma3_text", use_bidirectional_attention=True))[1]
    refused(model, "not plainly causal", random_ids(40))
    config = config_of(
        "llama4_text",
        layer_types=["chunked_attention"] * 2,
        attention_chunk_size=WINDOW,
        intermediate_size_mlp=64,
        moe_layers=[],
        num_local_experts=1,
    )
    for length in (2 * WINDOW, 2 * WINDOW + 5):
        refused(pair(config)[1], "neither causal nor a sliding window", random_ids(length))


def test_masks_that_it_did_not_make_are_refused() -> None:
    query = torch.zeros(1, 1, 4, 8)
    for mask in (None, torch.ones(1, 1, 4, 4, dtype=torch.bool), torch.zeros(1, 1, 1, 1)):
        with pytest.raises(UnsupportedModelError, match="makes itself"):
            windowed_attention(torch.nn.Module(), query, query, query, mask)


def test_it_is_chosen_only_where_it_applies() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert attention_for(config_of("gemma3_text"), cpu) == WINDOWED
    assert attention_for(config_of("gemma3_text"), cuda) == "sdpa"
    assert attention_for(tiny_config(), cpu) == "sdpa"
    for name in REFUSING:  # what transformers does not load with sdpa
        assert attention_for(config_of(name), cpu) == attention_for(config_of(name), cuda) == "eager"
    for config in (
        config_of("mistral", sliding_window=None),
        config_of("qwen2", use_sliding_window=False),
        config_of("qwen2", layer_types=["full_attention"] * 2),
        config_of("gemma2"),
        config_of("gemma3_text", use_bidirectional_attention=True),
    ):
        assert not supports_windowed(config), config.model_type
