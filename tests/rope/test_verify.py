"""`verify_positions` notices every way in which a model's positions can silently be wrong, and no healthy model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TARGET_LENGTH, tiny_config
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ctxext.errors import PositionsNotInEffectError, UnsupportedModelError
from ctxext.model.load import quiet
from ctxext.rope.patchers import extend_config
from ctxext.rope.verify import verify_positions

METHODS: dict[str, dict[str, Any]] = {
    "yarn": {"method": "yarn"},
    "yarn with an attention factor": {"method": "yarn", "attention_factor": 1.3},
    "linear": {"method": "linear"},
    "none": {"method": "none", "control": True},
}
every_method = pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS.keys())
rewriting = pytest.mark.parametrize("settings", [{"method": "yarn"}, {"method": "linear"}], ids=["yarn", "linear"])


def extended(**settings: Any) -> LlamaConfig:
    return extend_config(tiny_config(), target_length=TARGET_LENGTH, **{"method": "yarn", **settings})


def build(config: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(copy.deepcopy(config)).eval()


@every_method
def test_a_healthy_model_passes(settings: dict[str, Any]) -> None:
    config = extended(**settings)
    result = verify_positions(build(config), config)
    assert result.num_modules == 1
    assert result.num_frequencies == 8
    assert result.largest_error < 1e-6
    assert "8 frequencies match" in result.summary()


@every_method
def test_a_copied_model_passes(settings: dict[str, Any]) -> None:
    config = extended(**settings)
    verify_positions(copy.deepcopy(build(config)), config)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_and_reloaded_model_passes(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    config = extended(**settings)
    with quiet():
        build(config).save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    verify_positions(reloaded, config)
    verify_positions(reloaded, reloaded.config)


@rewriting
def test_a_config_edited_after_load_is_noticed(settings: dict[str, Any]) -> None:
    config = extended(**settings)
    model = build(tiny_config())
    model.config.rope_parameters = config.rope_parameters
    model.config.max_position_embeddings = config.max_position_embeddings
    with pytest.raises(PositionsNotInEffectError, match="differ from the extended config"):
        verify_positions(model, model.config)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_to_half_precision_is_noticed(settings: dict[str, Any], dtype: torch.dtype) -> None:
    config = extended(**settings)
    model = build(config).half() if dtype == torch.float16 else build(config).to(dtype)
    with pytest.raises(PositionsNotInEffectError, match=r"inv_freq.*got 'torch\.b?float16'"):
        verify_positions(model, config)


@every_method
def test_a_model_cast_to_half_precision_and_back_is_noticed(settings: dict[str, Any]) -> None:
    config = extended(**settings)
    with pytest.raises(PositionsNotInEffectError, match="differ from the extended config"):
        verify_positions(build(config).to(torch.bfloat16).to(torch.float32), config)


def test_a_model_in_double_precision_is_not_called_half_precision() -> None:
    config = extended()
    with pytest.raises(PositionsNotInEffectError, match="float64") as caught:
        verify_positions(build(config).double(), config)
    assert "were cast to half" not in str(caught.value)


@every_method
def test_a_wrong_attention_factor_is_noticed(settings: dict[str, Any]) -> None:
    config = extended(**settings)
    model = build(config)
    model.model.rotary_emb.attention_scaling *= 1.01
    with pytest.raises(PositionsNotInEffectError, match="attention factor"):
        verify_positions(model, config)


def test_another_method_than_the_configs_is_noticed() -> None:
    for mine, theirs in (("yarn", "linear"), ("linear", "yarn")):
        with pytest.raises(PositionsNotInEffectError):
            verify_positions(build(extended(method=mine)), extended(method=theirs))


def test_a_wrong_original_length_is_noticed() -> None:
    # What happens when the key is left out: upstream takes the raised maximum for the original length.
    config = extended()
    wrong = copy.deepcopy(config)
    wrong.rope_parameters["original_max_position_embeddings"] = TARGET_LENGTH
    with pytest.raises(PositionsNotInEffectError, match="differ from the extended config"):
        verify_positions(build(wrong), config)


def test_a_single_changed_frequency_is_named() -> None:
    config = extended()
    model = build(config)
    model.model.rotary_emb.inv_freq[5] *= 1.0001
    with pytest.raises(PositionsNotInEffectError, match=r"rotary_emb\.inv_freq\[5\]"):
        verify_positions(model, config)


def test_a_frequency_that_is_not_a_number_is_noticed() -> None:
    config = extended()
    model = build(config)
    model.model.rotary_emb.inv_freq[3] = float("nan")
    with pytest.raises(PositionsNotInEffectError, match="not in effect"):
        verify_positions(model, config)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_one_wrong_module_among_several_is_noticed(wrong: int) -> None:
    config = extended()
    modules = torch.nn.ModuleList(LlamaRotaryEmbedding(config) for _ in range(3))
    assert verify_positions(modules, config).num_modules == 3
    modules[wrong] = LlamaRotaryEmbedding(tiny_config())
    with pytest.raises(PositionsNotInEffectError, match=rf"{wrong}\.inv_freq"):
        verify_positions(modules, config)


@pytest.mark.parametrize("which", [0, 1])
def test_a_patched_forward_is_noticed(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = extended()
    model = build(config)
    original = model.model.rotary_emb.forward

    def patched(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Right at the first positions and wrong where extension matters.
        real, halved = original(x, position_ids), original(x, torch.where(position_ids > 64, 64, position_ids))
        return (halved[0], real[1]) if which == 0 else (real[0], halved[1])

    monkeypatch.setattr(model.model.rotary_emb, "forward", patched)
    with pytest.raises(PositionsNotInEffectError, match="cos" if which == 0 else "sin"):
        verify_positions(model, config)


def test_frequencies_of_another_head_size_are_noticed() -> None:
    config = extended()
    with pytest.raises(PositionsNotInEffectError, match="number of rotary frequencies"):
        verify_positions(build(extend_config(tiny_config(head_dim=32), target_length=TARGET_LENGTH)), config)


def test_a_model_without_rotary_modules_is_noticed() -> None:
    with pytest.raises(PositionsNotInEffectError, match="no rotary module"):
        verify_positions(torch.nn.Linear(2, 2), extended())


def test_a_config_without_reference_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no rotary positions"):
        verify_positions(torch.nn.Linear(2, 2), GPT2Config())
    unknown = tiny_config()
    unknown.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(UnsupportedModelError, match=r"no reference.*got 'spiral'"):
        verify_positions(torch.nn.Linear(2, 2), unknown)


NESTED: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_each_layer_type_is_compared_with_its_own_reference(layer_type: str) -> None:
    config = extend_config(Gemma3TextConfig(**NESTED), target_length=TARGET_LENGTH)
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(copy.deepcopy(config)).eval()
    result = verify_positions(model, config)
    assert set(result.layer_types) == {"sliding_attention", "full_attention"}
    assert result.attention_factor > 1
    getattr(model.model.rotary_emb, f"{layer_type}_inv_freq")[3] *= 1.001
    with pytest.raises(PositionsNotInEffectError, match=rf"{layer_type}_inv_freq\[3\]"):
        verify_positions(model, config)


def test_a_module_of_a_layer_type_that_the_config_does_not_name_is_noticed() -> None:
    config = extend_config(Gemma3TextConfig(**NESTED), target_length=TARGET_LENGTH)
    model = torch.nn.ModuleList(
        [Gemma3ForCausalLM(copy.deepcopy(config)).model.rotary_emb, LlamaRotaryEmbedding(extended())]
    )
    with pytest.raises(PositionsNotInEffectError, match="belongs to no layer type"):
        verify_positions(model, config)


@pytest.mark.parametrize("factor", [8, 32, 128])
def test_llama3_at_a_large_factor_is_not_taken_for_wrong(factor: int) -> None:
    # One frequency lies at the very end of llama3's ramp here, where float32 loses most.
    config = extend_config(
        tiny_config(head_dim=80, max_position_embeddings=5000), method="llama3", target_length=5000 * factor
    )
    module = LlamaRotaryEmbedding(config)
    result = verify_positions(module, config)
    assert result.largest_error < 2e-7 * max(factor, 15)
    module.inv_freq[39] *= 1.0001
    with pytest.raises(PositionsNotInEffectError):
        verify_positions(module, config)
