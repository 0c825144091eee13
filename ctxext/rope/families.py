"""What this architecture's RoPE is, read from its config; refuses what cannot be extended.

The config is a transformers config object, but nothing here imports transformers: only attributes are read.
"""

from __future__ import annotations

from typing import Any

from ctxext.errors import UnsupportedModelError
from ctxext.rope.methods import BaseRope

# Architectures without rotary positions, by model_type: what they use instead.
_WITHOUT_ROPE = {
    "gpt2": "learned absolute positions",
    "gpt_neo": "learned absolute positions",
    "opt": "learned absolute positions",
    "xglm": "sinusoidal absolute positions",
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "mamba": "no positions (a state-space model)",
    "mamba2": "no positions (a state-space model)",
    "rwkv": "no positions (a recurrent model)",
}
# They rotate, but with sinusoid buffers of their own that no rope config reaches.
_OWN_SINUSOIDS = ("gptj", "codegen")

_SCALED_TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def text_config(config: Any) -> Any:
    """The language model's part of a config (itself unless the model is multimodal)."""
    return config.get_text_config()


def base_ropes(config: Any) -> list[BaseRope]:
    """The RoPE of every group of layers that extension rewrites (one group when the config is flat).

    Raises:
        UnsupportedModelError: the model has no RoPE, or one that ctxext cannot extend correctly.
    """
    text = text_config(config)
    model_type = str(getattr(text, "model_type", "unknown"))
    _refuse_without_rope(text, model_type)
    parameters = text.rope_parameters
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModelError(
            "this model has one RoPE per layer type, which this version cannot extend yet",
            where=f"{model_type}.rope_parameters",
            got=", ".join(sorted(parameters)),
            expected="one flat rope_parameters dict",
        )
    rope_type = parameters.get("rope_type", "default")
    if rope_type != "default":
        scaled = "already scaled" if rope_type in _SCALED_TYPES else "of a kind that ctxext does not know"
        raise UnsupportedModelError(
            f"the model's RoPE is {scaled}",
            where=f"{model_type}.rope_parameters.rope_type",
            got=rope_type,
            expected="'default' (an unscaled base model)",
            hint="Start from the base model before it was extended.",
        )
    theta = parameters.get("rope_theta")
    if not isinstance(theta, (int, float)) or theta <= 1:
        raise UnsupportedModelError(
            "the config does not say its RoPE base",
            where=f"{model_type}.rope_parameters.rope_theta",
            got=theta,
            expected="a number above 1",
        )
    return [
        BaseRope(
            theta=float(theta),
            rotary_dim=_rotary_dim(text, parameters, model_type),
            original_length=original_length(text),
            kept=tuple((key, float(parameters[key])) for key in ("partial_rotary_factor",) if parameters.get(key)),
        )
    ]


def original_length(config: Any) -> int:
    """Positions the base model was trained for, as its config says.

    Raises:
        UnsupportedModelError: `max_position_embeddings` is missing or not a positive integer.
    """
    length = getattr(text_config(config), "max_position_embeddings", None)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UnsupportedModelError(
            "the config does not say how many positions the model was trained for",
            where="max_position_embeddings",
            got=length,
            expected="a positive integer",
        )
    return length


def _rotary_dim(text: Any, parameters: dict[str, Any], model_type: str) -> int:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        raise UnsupportedModelError(
            "the rotated part of a head must be even",
            where=f"{model_type}.head_dim",
            got=rotary_dim,
        )
    return rotary_dim


def _refuse_without_rope(text: Any, model_type: str) -> None:
    instead = _WITHOUT_ROPE.get(model_type)
    if instead is None and getattr(text, "alibi", False):
        instead = "ALiBi"
    if instead is None and model_type in _OWN_SINUSOIDS:
        raise UnsupportedModelError(
            f"'{model_type}' computes its rotation from buffers of its own, which no config reaches",
            where="model",
        )
    if instead is None and not getattr(text, "rope_parameters", None):
        instead = "no rotary positions that its config shows"
    if instead is not None:
        raise UnsupportedModelError(
            f"'{model_type}' uses {instead}: there is no RoPE to rewrite",
            where="model",
            hint="Choose a model with rotary positions (Llama, Qwen, Mistral, SmolLM ...).",
        )
