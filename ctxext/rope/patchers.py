"""Patchers rewrite a pretrained model's RoPE. This one rewrites the config, before any weight is loaded.

Editing `model.config` after load does nothing in transformers 5 (the frequencies are computed in the rotary module's
constructor), and passing `rope_scaling={...}` to `from_pretrained` replaces the whole dict and loses theta. So the
complete dict is written into a copy of the config, and the model is then built from that copy.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from ctxext.errors import UnsupportedModelError, UsageError
from ctxext.rope.families import base_ropes, text_config
from ctxext.rope.methods import RopeMethod, create_method

ConfigT = TypeVar("ConfigT")


def extend_config(config: ConfigT, *, method: str = "yarn", target_length: int, **method_parameters: Any) -> ConfigT:
    """A new config whose RoPE reaches `target_length`; the argument is left untouched.

    Load with it: `AutoModelForCausalLM.from_pretrained(model, config=extend_config(config, ...))`.

    Args:
        config: a transformers config of an unscaled RoPE model (multimodal: its text part is extended).
        method: `yarn`, `linear` or `none` (the control arm, which needs `control=True`).
        target_length: positions the extended model shall reach; an integer above the original length.
        method_parameters: the method's own: for YaRN `beta_fast`, `beta_slow`, `attention_factor` and `truncate`.

    Raises:
        UsageError: unknown method or parameter, or a target not above the original length.
        UnsupportedModelError: the model has no RoPE that can be rewritten.
    """
    if not isinstance(target_length, int) or isinstance(target_length, bool):
        raise UsageError("target_length must be an integer", where="target_length", got=target_length)
    return apply_method(config, create_method(method, **method_parameters), target_length)


def apply_method(config: ConfigT, method: RopeMethod, target_length: int) -> ConfigT:
    """`extend_config` for a method that exists already; same errors."""
    extended = copy.deepcopy(config)
    text: Any = text_config(extended)
    (base,) = base_ropes(extended)
    resolved = method.resolved(base.original_length, target_length)
    text.rope_parameters = resolved.rope_parameters(base)
    text.max_position_embeddings = target_length
    if getattr(text, "head_dim", 0) is None:
        # Mixtral and MiniMax leave it open, which transformers' own YaRN cannot read.
        text.head_dim = text.hidden_size // text.num_attention_heads
    text.standardize_rope_params()
    try:
        text.validate_rope()
    except (KeyError, ValueError) as error:
        raise UnsupportedModelError(
            f"transformers refuses this RoPE for the model ({error})",
            where=f"{text.model_type}.rope_parameters",
            got=resolved.method,
            hint="Another rope.method may be accepted.",
        ) from error
    return extended
