"""The exported config in both forms, so that old and new readers compute the same positions.

transformers 4 and mlx-lm read only top-level `rope_theta` and `rope_scaling`; given `rope_parameters` alone they run
unscaled with theta 10,000 and say nothing. transformers 5 reads either. The two forms never disagree, because one is
derived from the other here.
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
# Families with one RoPE per layer type that transformers 4.57 knows: how its config says the sliding layers' base.
# It scales full-attention layers only, as these do.
_OLDER_NESTED = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq", "olmo3": None}


def add_older_form(config: dict[str, Any]) -> dict[str, Any]:
    """A config dict with the older keys beside its `rope_parameters`, in its text part when it is multimodal.

    A config with one RoPE per layer type is given them where transformers 4.57 knows the family; it has no older form
    otherwise, and is returned as it is.
    """
    nested = config.get("text_config")
    if isinstance(nested, dict) and "rope_parameters" in nested:
        return {**config, "text_config": add_older_form(nested)}
    parameters, model_type = config["rope_parameters"], config.get("model_type")
    if any(isinstance(value, dict) for value in parameters.values()):
        return _older_nested(config, parameters, model_type)
    names = _OLDER_NAMES.get(str(model_type), {})
    older: dict[str, Any] = {
        names.get(key, key): parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters
    }
    return {**config, **older, **_older_scaling(parameters)}


def has_older_form(config: dict[str, Any]) -> bool:
    """Whether `add_older_form` can say the same in the older keys."""
    text = config.get("text_config", config)
    nested = any(isinstance(value, dict) for value in text["rope_parameters"].values())
    return not nested or text.get("model_type") in _OLDER_NESTED


def _older_nested(config: dict[str, Any], parameters: dict[str, Any], model_type: Any) -> dict[str, Any]:
    if model_type not in _OLDER_NESTED:
        return config
    full = parameters["full_attention"]
    older: dict[str, Any] = {"rope_theta": full["rope_theta"], **_older_scaling(full)}
    local_name = _OLDER_NESTED[model_type]
    if local_name is not None:
        older[local_name] = parameters["sliding_attention"]["rope_theta"]
    return {**config, **older}


def _older_scaling(parameters: dict[str, Any]) -> dict[str, Any]:
    """`rope_scaling`, and the original length beside it where transformers 4 looks for it there (LongRoPE)."""
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        return {"rope_scaling": None}
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    older: dict[str, Any] = {"rope_scaling": scaling}
    if rope_type == "longrope":
        older["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    return older


def write_both_forms(folder: Path) -> None:
    """Rewrite `config.json` in `folder` with both forms."""
    path = folder / "config.json"
    write_json_atomic(path, add_older_form(read_json(path)))
