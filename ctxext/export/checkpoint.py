"""The exported config in both forms, so that old and new readers compute the same positions.

transformers 4 and mlx-lm read only top-level `rope_theta` and `rope_scaling`; given `rope_parameters` alone they run
unscaled with theta 10,000 and say nothing. transformers 5 reads either, and takes `rope_scaling` where both are there.
The two forms never disagree, because one is derived from the other here.

What is written here, and what cannot be, was compared with transformers 4.57.6 (tests/export/test_both_forms.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctxext.files import read_json, write_json_atomic

# What transformers 4 calls these entries in families that have names of their own for them.
_OLDER_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
# Entries beside RoPE that transformers 5 saves under another name only: new name -> old name.
_RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}}
# Families with one RoPE per layer type that transformers 4.57 knows: how its config says the sliding layers' base.
# It scales full-attention layers only, as these do.
_OLDER_NESTED = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq", "olmo3": None}
# transformers 4.57 accepts `rope_scaling` in these families only with exactly these entries.
_EXACT_SCALING = {
    "olmo": ("linear", ("type", "factor")),
    "olmo2": ("linear", ("type", "factor")),
    "phi3": ("longrope", ("type", "short_factor", "long_factor")),
    "phi4_multimodal": ("longrope", ("type", "short_factor", "long_factor")),
}
# Families that transformers 4.57 knows, but whose scaling, or whose config as transformers 5 saves it, it cannot read.
_NEVER_READ = {
    "granitemoehybrid": "transformers 4.57 has other names for this family's layer types and refuses the config",
    "modernbert-decoder": "transformers 4.57 has no scaling for this family, and other names for its bases",
    "nemotron": "transformers 4.57 ignores any scaling of this family (a raised theta it reads)",
    "zamba2": "transformers 4.57 has other names for this family's layer types and fails on the config",
}


def add_older_form(config: dict[str, Any]) -> dict[str, Any]:
    """A config dict with the older keys beside its `rope_parameters`, in its text part when it is multimodal.

    A config with one RoPE per layer type is given them where transformers 4.57 knows the family; it has no older form
    otherwise, and is returned as it is.
    """
    nested = config.get("text_config")
    if isinstance(nested, dict) and "rope_parameters" in nested:
        return {**config, "text_config": add_older_form(nested)}
    parameters, model_type = config["rope_parameters"], str(config.get("model_type"))
    renamed = {old: config[new] for new, old in _RENAMED.get(model_type, {}).items() if new in config}
    if _is_nested(parameters):
        return {**config, **renamed, **_older_nested(parameters, model_type)}
    names = _OLDER_NAMES.get(model_type, {})
    older: dict[str, Any] = {
        names.get(key, key): parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters
    }
    return {**config, **renamed, **older, **_older_scaling(parameters, model_type)}


def older_form_gap(config: dict[str, Any]) -> str | None:
    """Why transformers 4.57 will not read the positions of a config, whatever keys it holds; None when it will."""
    text = config.get("text_config", config)
    parameters, model_type = text["rope_parameters"], str(text.get("model_type"))
    if _is_nested(parameters):
        return _nested_gap(parameters, model_type)
    rope_type = parameters.get("rope_type", "default")
    if model_type in _NEVER_READ and (rope_type != "default" or model_type != "nemotron"):
        return _NEVER_READ[model_type]
    accepted, _ = _EXACT_SCALING.get(model_type, (rope_type, ()))
    if rope_type not in ("default", accepted):
        return f"transformers 4.57 refuses any scaling of this family but {accepted}"
    if model_type in _EXACT_SCALING and parameters.get("attention_factor", 1.0) != 1.0:
        return "transformers 4.57 refuses an explicit attention factor for this family"
    if model_type == "deepseek_v2" and rope_type == "yarn" and parameters.get("mscale_all_dim"):
        return "transformers 4.57 leaves YaRN's softmax temperature out for this family"
    return None


def has_older_form(config: dict[str, Any]) -> bool:
    """Whether `add_older_form` can say the same in the older keys; `older_form_gap` tells why not."""
    return older_form_gap(config) is None


def _is_nested(parameters: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in parameters.values())


def _nested_gap(parameters: dict[str, Any], model_type: str) -> str | None:
    if model_type not in _OLDER_NESTED:
        return _NEVER_READ.get(model_type, "the older keys cannot say one RoPE per layer type for this family")
    bases = {value["rope_theta"] for value in parameters.values() if value}
    if _OLDER_NESTED[model_type] is None and len(bases) > 1:
        return "transformers 4.57 has one base for all layers of this family, so a raised theta cannot be said"
    return None


def _older_nested(parameters: dict[str, Any], model_type: str) -> dict[str, Any]:
    if model_type not in _OLDER_NESTED:
        return {}
    full = parameters["full_attention"]
    older: dict[str, Any] = {"rope_theta": full["rope_theta"], **_older_scaling(full, model_type)}
    local_name = _OLDER_NESTED[model_type]
    if local_name is not None:
        older[local_name] = parameters["sliding_attention"]["rope_theta"]
    return older


def _older_scaling(parameters: dict[str, Any], model_type: str) -> dict[str, Any]:
    """`rope_scaling`, and the original length beside it where transformers 4 looks for it there (LongRoPE)."""
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        return {"rope_scaling": None}
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    exact_type, entries = _EXACT_SCALING.get(model_type, (None, ()))
    if rope_type == exact_type and parameters.get("attention_factor", 1.0) == 1.0:
        # What is left out follows from the two lengths, as in the configs that Phi-3 was published with.
        scaling = {key: value for key, value in {**scaling, "type": rope_type}.items() if key in entries}
    older: dict[str, Any] = {"rope_scaling": scaling}
    if rope_type == "longrope":
        older["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    return older


def write_both_forms(folder: Path) -> None:
    """Rewrite `config.json` in `folder` with both forms."""
    path = folder / "config.json"
    write_json_atomic(path, add_older_form(read_json(path)))
