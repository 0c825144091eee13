"""What a model built from a config must rotate by, from our own formulas: the reference for every check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctxext.errors import UnsupportedModelError
from ctxext.rope.base import BaseRope, RopeTable
from ctxext.rope.families import (
    has_own_temperature,
    kept_entries,
    original_length,
    rope_groups,
    rotary_dim,
    text_config,
)
from ctxext.rope.methods import READABLE_TYPES, table_from_rope_parameters

# transformers computes b^(2i/d) in float32: rounding the exponent is worth up to ln(b) * 6e-8, 8e-7 for b = 1e6.
RELATIVE_TOLERANCE = 3e-6


def relative_tolerance(parameters: Mapping[str, Any]) -> float:
    """How far float32 frequencies of a model may be from the reference for a rope dict.

    llama3 subtracts nearly equal numbers at the slow end of its ramp, and divides the rest by the factor: what is
    rounded there weighs `factor` times as much (measured: 1e-7 times the factor).
    """
    if parameters.get("rope_type") == "llama3":
        return max(RELATIVE_TOLERANCE, 2e-7 * float(parameters["factor"]))
    return RELATIVE_TOLERANCE


def base_of_parameters(text: Any, parameters: Mapping[str, Any], layer_type: str | None) -> BaseRope:
    """The RoPE below a rope dict: its theta and dimensions, and the length before the dict's scaling.

    Raises:
        UnsupportedModelError: a dict without a base, or of a type that ctxext has no method for.
    """
    rope_type = parameters.get("rope_type", "default")
    if "rope_theta" not in parameters or rope_type not in READABLE_TYPES:
        raise UnsupportedModelError(
            "this version has no reference for the model's RoPE",
            where=f"{text.model_type}.rope_parameters",
            got=str(rope_type),
        )
    return BaseRope(
        theta=float(parameters["rope_theta"]),
        rotary_dim=rotary_dim(text, dict(parameters), layer_type),
        original_length=int(parameters.get("original_max_position_embeddings") or original_length(text)),
        layer_type=layer_type,
        kept=kept_entries(parameters),
        own_temperature=has_own_temperature(text),
        proportional=rope_type == "proportional",
    )


def reference_tables(config: Any) -> dict[str | None, RopeTable]:
    """Frequencies and attention factor that a model built from `config` must have.

    By layer type; the key is None when the config is flat. For `dynamic` the table is that of a sequence of twice the
    original length.

    Raises:
        UnsupportedModelError: no RoPE, or a rope type that ctxext has no method for.
    """
    text = text_config(config)
    return {
        layer_type: table_from_rope_parameters(
            parameters, base_of_parameters(text, parameters, layer_type), original_length(text)
        )
        for layer_type, parameters in rope_groups(config).items()
    }


def describe_positions(config: Any) -> str:
    """One line: RoPE type, factor, theta and reach of a config, by layer type where they differ."""
    text = text_config(config)
    groups = []
    for layer_type, parameters in rope_groups(config).items():
        factor = f" factor {parameters['factor']:g}" if "factor" in parameters else ""
        name = f"{layer_type}: " if layer_type else ""
        groups.append(f"{name}{parameters.get('rope_type', 'default')}{factor}, theta {parameters['rope_theta']:g}")
    return f"{'; '.join(groups)}; {text.max_position_embeddings} positions"
