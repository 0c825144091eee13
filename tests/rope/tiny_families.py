"""A tiny random model of every causal-LM family of the installed transformers, where one can be built."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Emu3ForCausalLM,
    MllamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ctxext.model.load import quiet
from ctxext.rope.families import attribute

ORIGINAL_LENGTH = 128

# Sizes by attribute name; each family takes those that it has.
_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "intermediate_size": 64,
    "ffn_hidden_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "max_position_embeddings": ORIGINAL_LENGTH,
    "max_seq_len": ORIGINAL_LENGTH,
    "n_positions": ORIGINAL_LENGTH,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "sliding_window": 512,
    "attention_chunk_size": 512,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    "mamba_n_groups": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 3,
    "initializer_range": 0.1,
}


# What else a family needs to be tiny, or to have attention at all.
_FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"position_embedding_type": "rope", "layer_types": ["linear_attention", "full_attention"]},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 24, "swa_head_dim": 24, "swa_v_head_dim": 24},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "nemo_conv_channels": 32,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
        "split_ngram_parts": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"use_mem_rope": True, "layers_block_type": ["mamba", "hybrid"], "layer_types": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}


def causal_families() -> list[str]:
    """Every model_type that AutoModelForCausalLM knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _layer_types(config_class: type[PreTrainedConfig]) -> list[str] | None:
    default = getattr(config_class(), "layer_types", None)
    if not default:
        return None
    kinds = sorted(set(default))
    attending = [kind for kind in kinds if "linear" not in kind and "mamba" not in kind]
    # One of each, and the long-range one last where there are several.
    return (kinds if len(kinds) >= 2 else kinds * 2) if attending else kinds * 2


def tiny_family_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The family's config with tiny sizes.

    Raises:
        Exception: whatever the family's own checks raise when it cannot be made tiny like this.
    """
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    text = default.get_text_config()
    text_class = type(text)
    known = {name for cls in text_class.__mro__ for name in vars(cls).get("__annotations__", {})}
    known |= set(inspect.signature(text_class.__init__).parameters)
    values = {name: value for name, value in _SIZES.items() if name in known and attribute(text, name, 0) is not False}
    layer_types = _layer_types(text_class)
    if layer_types is not None and "layer_types" in known:
        values["layer_types"] = layer_types
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in values:
                values[name] = len(layer_types)
    if "per_layer_config" in vars(text_class) or text.model_type.startswith("gemma4"):
        values["global_head_dim"] = 16
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention shares nothing else
    merged = {**values, **_FAMILY_SIZES.get(text.model_type, {}), **changes}
    config = text_class(**{name: value for name, value in merged.items() if value is not None})
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") in ("llama3", "yarn"):  # scaled by default: from 32 positions to 128
        config.rope_parameters = {**parameters, "factor": 4.0, "original_max_position_embeddings": ORIGINAL_LENGTH // 4}
    return config


@functools.cache
def buildable(model_type: str) -> str | None:
    """None when a tiny model of the family can be built and run, else the reason."""
    try:
        run(build(tiny_family_config(model_type)))
    except Exception as error:  # any family may refuse in any way; the reason is what we want to know
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    return None


# AutoModelForCausalLM knows these by the config of the whole multimodal model, whose class then takes the text part.
_TEXT_ONLY = {"emu3_text_model": Emu3ForCausalLM, "mllama_text_model": MllamaForCausalLM}


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    with quiet():
        if config.model_type in _TEXT_ONLY:
            model = _TEXT_ONLY[config.model_type](copy.deepcopy(config))
        else:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval()
    return model


def run(model: PreTrainedModel, length: int = 12, offset: int = 0) -> torch.Tensor:
    """Logits [1, length, V] of fixed tokens at positions from `offset` on."""
    ids = (torch.arange(length)[None] * 7) % 80 + 10
    positions = torch.arange(offset, offset + length)[None]
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits
    return logits
