"""Patchers rewrite a pretrained model's RoPE. This one rewrites the config, before any weight is loaded.

Editing `model.config` after load does nothing in transformers 5 (the frequencies are computed in the rotary module's
constructor), and passing `rope_scaling={...}` to `from_pretrained` replaces the whole dict and loses theta. So the
complete dict is written into a copy of the config, and the model is then built from that copy.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import numpy as np

from ctxext.errors import UnsupportedModelError, UsageError
from ctxext.rope.base import RopeMethod
from ctxext.rope.families import (
    OnExisting,
    attribute,
    base_ropes,
    check_method,
    check_parameters,
    original_length,
    rope_groups,
    takes_mscale,
    takes_only_maps,
    text_config,
)
from ctxext.rope.methods import LongRope, NoRewrite, create_method
from ctxext.rope.reference import reference_tables

ConfigT = TypeVar("ConfigT")


def extend_config(
    config: ConfigT,
    *,
    method: str = "yarn",
    target_length: int,
    on_existing: OnExisting = "refuse",
    **method_parameters: Any,
) -> ConfigT:
    """A new config whose RoPE reaches `target_length`; the argument is left untouched.

    Load with it: `AutoModelForCausalLM.from_pretrained(model, config=extend_config(config, ...))`.

    Args:
        config: a transformers config of a RoPE model (multimodal: its text part is extended; one RoPE per layer type:
            that of the full-attention layers is).
        method: a name that `ctxext list methods` shows; `none` (the control arm) needs `control=True`.
        target_length: positions the extended model shall reach; an integer above the original length.
        on_existing: for a model whose RoPE is scaled already: `refuse`, `replace` that scaling, or `compose` with it.
        method_parameters: the method's own: for YaRN `beta_fast`, `beta_slow`, `attention_factor` and `truncate`.

    Raises:
        UsageError: unknown method or parameter, or a target not above the original length.
        UnsupportedModelError: the model has no RoPE that can be rewritten.
    """
    if not isinstance(target_length, int) or isinstance(target_length, bool):
        raise UsageError("target_length must be an integer", where="target_length", got=target_length)
    return apply_method(config, create_method(method, **method_parameters), target_length, on_existing)


def apply_method(
    config: ConfigT, method: RopeMethod, target_length: int, on_existing: OnExisting = "refuse"
) -> ConfigT:
    """`extend_config` for a method that exists already; same errors."""
    extended = copy.deepcopy(config)
    text: Any = text_config(extended)
    maximum = target_length
    untouched = isinstance(method, NoRewrite)  # whatever scaling there is stays: that is what a control arm is
    for base in base_ropes(extended, "replace" if untouched and on_existing == "refuse" else on_existing):
        check_method(base, method.method)
        if untouched:
            method.resolved(original_length(text), target_length)
            continue
        resolved = method.resolved(base.original_length, target_length)
        # Two-range LongRoPE is Phi-3's own form; PhiMoE's forward pass never leaves the short range.
        own_form = isinstance(resolved, LongRope) and not takes_mscale(text)
        parameters = resolved.rope_parameters(base, as_map=takes_only_maps(text) and not own_form)
        check_parameters(base, parameters)
        if takes_mscale(text):
            mscale = parameters.get("attention_factor", 1.0)
            parameters |= {"short_mscale": mscale, "long_mscale": mscale}
        if base.layer_type is None:
            text.rope_parameters = parameters
        else:
            text.rope_parameters[base.layer_type] = parameters
        maximum = resolved.maximum_length(base)
    text.max_position_embeddings = maximum
    if hasattr(text, "original_max_position_embeddings") and not untouched:
        # Phi-3 keeps it outside the dict, and transformers gives that one priority.
        text.original_max_position_embeddings = parameters.get("original_max_position_embeddings", target_length)
    if attribute(text, "head_dim", 0) is None:
        # Mixtral and MiniMax leave it open, which transformers' own YaRN cannot read.
        text.head_dim = text.hidden_size // text.num_attention_heads
    text.standardize_rope_params()
    if untouched:
        _check_untouched(config, extended)
    try:
        text.validate_rope()
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"transformers refuses this RoPE for the model ({error})",
            where=f"{text.model_type}.rope_parameters",
            got=method.method,
            hint="Another rope.method may be accepted.",
        ) from error
    return extended


def _check_untouched(config: Any, extended: Any) -> None:
    """A control arm must rotate as before.

    Raises:
        UnsupportedModelError: the scaling that the model has follows its maximum length.
    """
    before, after = reference_tables(config), reference_tables(extended)
    for layer_type, parameters in rope_groups(config).items():
        was, becomes = before[layer_type], after[layer_type]
        same = was.attention_factor == becomes.attention_factor and np.array_equal(was.inv_freq, becomes.inv_freq)
        if not same or parameters.get("rope_type") == "dynamic":
            raise UnsupportedModelError(
                "the scaling that this model has follows max_position_embeddings, so it has no control arm: raising "
                "the allowed length changes how it rotates",
                where="rope.method",
                got="none",
                hint="Take the model before its scaling.",
            )
