"""The portable form: any frequencies, any attention factor, read right by every program that was tried.

RoPE is linear in the query and the key, so multiplying cos and sin by an attention factor a equals multiplying the
query's and key's rotary dimensions by a *before* they are rotated. The portable form therefore

- scales the rows of the query and key projections that are rotated by a (biases too). Where a norm stands between
  projection and rotation (QK-norm), the norm's weights are scaled instead, and a norm that computes with 1 + weight
  (Gemma) gets a (1 + w) - 1;
- writes the frequencies as a `longrope` map whose original length is its maximum and whose factor is 1, from which
  every reader derives an attention factor of 1.

Exact where it applies, and refused where it would not be: two ranges of frequencies, multi-head latent attention with
an attention factor, attention whose weights are not known to this module.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ctxext.errors import UnsupportedModelError
from ctxext.rope.families import (
    attribute,
    check_parameters,
    has_own_temperature,
    rope_groups,
    rotary_dim,
    takes_mscale,
    text_config,
)
from ctxext.rope.families import head_dim as head_dim_of
from ctxext.rope.methods import LongRope
from ctxext.rope.reference import base_of_parameters, reference_tables

if TYPE_CHECKING:
    from torch import Tensor

ConfigT = TypeVar("ConfigT")
Edit = Callable[["Tensor"], "Tensor"]

# Attention weights by the names that transformers gives them, and how their rows lie.
_PROJECTIONS = {
    "q_proj": "heads",
    "k_proj": "heads",
    "qkv_proj": "query-key-value",
    "query_key_value": "interleaved",
}
# Families whose QK-norm is applied after the rotation, or before it but without weights to scale.
_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
_SIDES = {
    "q_proj": "query",
    "q_norm": "query",
    "q_layernorm": "query",
    "k_proj": "key",
    "k_norm": "key",
    "k_layernorm": "key",
}
_ONE_PLUS_WEIGHT = ("gemma", "gemma2", "gemma3_text", "vaultgemma")

# Families for which the folded form was compared with transformers' own attention factor (tests/rope/test_portable.py).
FOLDABLE = (
    "apertus arcee aria_text bitnet cohere cwm diffllama doge dots1 ernie4_5 ernie4_5_moe falcon_h1 flex_olmo "
    "gemma gemma2 gemma3_text gemma3n_text glm glm4 glm4_moe gpt_neox gpt_neox_japanese gpt_oss granite "
    "granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder "
    "jais2 laguna lfm2 llama mellum mimo_v2_flash minimax_m2 ministral mistral mixtral nanochat nemotron olmo "
    "olmo2 olmo3 olmoe persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss "
    "smollm3 solar_open stablelm starcoder2 vaultgemma"
).split()


@dataclass(frozen=True)
class _Attention:
    """What folding needs to know about one layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    factor: float


def portable_config(config: ConfigT, *, force: bool = True) -> tuple[ConfigT, dict[str | None, float]]:
    """The config in the portable form, and the attention factor that has to be folded by layer type.

    Args:
        force: also rewrite stock types (`linear`, `yarn` ...); otherwise only maps and those with an attention factor
            that readers do not derive by themselves.

    Raises:
        UnsupportedModelError: two ranges of frequencies, dynamic scaling, or an attention factor that this family
            cannot fold.
    """
    portable = copy.deepcopy(config)
    text: Any = text_config(portable)
    tables = reference_tables(config)
    factors: dict[str | None, float] = {}
    for layer_type, parameters in rope_groups(config).items():
        rope_type = parameters.get("rope_type", "default")
        if rope_type == "default" or not (force or needs_portable_form(parameters)):
            continue
        table = tables[layer_type]
        if parameters.get("mscale_all_dim") and has_own_temperature(text):
            raise UnsupportedModelError(
                "multi-head latent attention takes its softmax scale from YaRN's stock form, which a map would lose",
                where=f"{text.model_type}.rope_parameters.mscale_all_dim",
                got=parameters["mscale_all_dim"],
            )
        if table.short_inv_freq is not None:
            raise UnsupportedModelError(
                "no single table of frequencies describes this RoPE, so it has no portable form",
                where=f"{text.model_type}.rope_parameters.rope_type",
                got=f"{rope_type} with two ranges" if rope_type == "longrope" else str(rope_type),
            )
        base = replace(base_of_parameters(text, parameters, layer_type), original_length=text.max_position_embeddings)
        ratios = base.unscaled() / table.inv_freq
        carrier = LongRope(factor=1.0, long_factor=[float(value) for value in ratios], attention_factor=1.0)
        written = {key: value for key, value in carrier.map_parameters(base).items() if key != "attention_factor"}
        if takes_mscale(text):
            written |= {"short_mscale": 1.0, "long_mscale": 1.0}
        check_parameters(base, written)
        if layer_type is None:
            text.rope_parameters = written
        else:
            text.rope_parameters[layer_type] = written
        if table.attention_factor != 1.0:
            factors[layer_type] = table.attention_factor
    if factors:
        _refuse_unfoldable(text)
    if hasattr(text, "original_max_position_embeddings") and None in rope_groups(portable):
        text.original_max_position_embeddings = text.max_position_embeddings
    return portable, factors


def exported_form(config: ConfigT, portable: bool | None = None) -> tuple[ConfigT, dict[str | None, float]]:
    """The config as it is written to disk, and the attention factors that go into the weights by layer type.

    Args:
        portable: True for the portable form always, False for stock types (a map with an attention factor is then
            written as it is, and other programs misread it), None for what every reader computes right.

    Raises:
        UnsupportedModelError: see `portable_config`.
    """
    if portable is False:
        return config, {}
    return portable_config(config, force=bool(portable))


def needs_portable_form(parameters: Mapping[str, Any]) -> bool:
    """Whether some reader would compute this rope dict wrong: a one-range map with an attention factor, or a YaRN
    whose attention factor is not the one that readers derive."""
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "longrope":
        return parameters["short_factor"] == parameters["long_factor"] and not is_portable(parameters)
    return rope_type == "yarn" and parameters.get("attention_factor") is not None


def is_portable(parameters: Mapping[str, Any]) -> bool:
    """Whether a rope dict is a map from which every reader derives an attention factor of 1."""
    return (
        parameters.get("rope_type") == "longrope"
        and parameters.get("short_factor") == parameters.get("long_factor")
        and parameters.get("factor") == 1.0
        and parameters.get("attention_factor") in (None, 1.0)
    )


def fold_edits(config: Any, names: Iterable[str], factors: Mapping[str | None, float]) -> dict[str, Edit]:
    """For each weight that the attention factor is folded into, what to do with it.

    Args:
        config: of the model as it was (any form); says which dimensions are rotated.
        names: all tensor names of the checkpoint.
        factors: from `portable_config`.

    Raises:
        UnsupportedModelError: a layer's query and key weights were not found.
    """
    if not factors:
        return {}
    text = text_config(config)
    _refuse_unfoldable(text)
    by_layer = _attention_by_layer(text, factors)
    tensors = _attention_tensors(names)
    shared = text.num_hidden_layers - int(attribute(text, "num_kv_shared_layers") or 0)
    edits: dict[str, Edit] = {}
    for layer, attention in by_layer.items():
        found = tensors.get(layer, {})
        normed = {part for part in found.values() if part in _NORMS}
        for name, part in found.items():
            if part in _NORMS:
                edits[name] = _norm_edit(attention, part, text.model_type in _ONE_PLUS_WEIGHT and "weight" in name)
            elif not normed:
                edits[name] = _projection_edit(attention, part)
        edited = {_SIDES.get(found[name], "both") for name in found if name in edits}
        # A layer that shares an earlier layer's keys may have none of its own.
        if not ("both" in edited or ("query" in edited and ("key" in edited or layer >= shared))):
            raise UnsupportedModelError(
                "the attention factor cannot be folded: a layer's query and key weights were not found",
                where=f"{text.model_type}, layer {layer}",
            )
    return edits


def _attention_tensors(names: Iterable[str]) -> dict[int, dict[str, str]]:
    """The language model's query and key weights and norms: by layer, what each tensor is.

    Raises:
        UnsupportedModelError: several towers have such layers, and which one reads text cannot be told.
    """
    towers: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        match = re.search(r"^(.*)\blayers\.(\d+)\.(?:self_attn|attention)\.(\w+)\.(?:weight|bias)$", name)
        if match and (match[3] in _PROJECTIONS or match[3] in _NORMS):
            towers.setdefault(match[1], {}).setdefault(int(match[2]), {})[name] = match[3]
    if len(towers) > 1:  # a vision tower's attention has the same names
        named = {path for path in towers if {"language_model", "text_model"} & {*path.split(".")}} or {"model."}
        towers = {path: found for path, found in towers.items() if path in named}
        if len(towers) != 1:
            raise UnsupportedModelError(
                "the attention factor cannot be folded: which of the model's towers reads text cannot be told",
                where=", ".join(towers) or "layers",
            )
    return next(iter(towers.values()), {})


def _attention_by_layer(text: Any, factors: Mapping[str | None, float]) -> dict[int, _Attention]:
    groups, layer_types = rope_groups(text), getattr(text, "layer_types", None)
    unrotated = {layer for layer, used in enumerate(attribute(text, "no_rope_layers") or ()) if not used}
    layers = {}
    for layer in range(text.num_hidden_layers):
        group = None if None in groups else layer_types[layer]  # type: ignore[index]
        if group not in factors or layer in unrotated:
            continue
        layers[layer] = _Attention(
            num_heads=text.num_attention_heads,
            num_kv_heads=attribute(text, "num_key_value_heads") or text.num_attention_heads,
            head_dim=head_dim_of(text, group),
            rotary_dim=rotary_dim(text, groups[group], group),
            factor=factors[group],
        )
    return layers


def _projection_edit(attention: _Attention, part: str) -> Edit:
    """Scale the rotary rows of a projection's weight [rows, hidden] or bias [rows]."""
    heads, kv_heads, size, rotated = (
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_dim,
        attention.rotary_dim,
    )
    layout = _PROJECTIONS[part]

    def edit(tensor: Tensor) -> Tensor:
        scaled = tensor.clone()
        if layout == "interleaved":  # GPT-NeoX: each head's query, key and value in turn
            scaled.view(heads, 3, size, -1)[:, :2, :rotated] *= attention.factor
        elif layout == "query-key-value":  # Phi-3: all queries, all keys, all values
            scaled[: (heads + kv_heads) * size].view(heads + kv_heads, size, -1)[:, :rotated] *= attention.factor
        else:
            scaled.view(scaled.shape[0] // size, size, -1)[:, :rotated] *= attention.factor
        return scaled

    return edit


def _norm_edit(attention: _Attention, part: str, one_plus_weight: bool) -> Edit:
    """Scale the rotary entries of a QK-norm's weight or bias, over one head [d] or all heads [h d]."""

    def edit(tensor: Tensor) -> Tensor:
        scaled = tensor.clone()
        rows = scaled.view(-1, attention.head_dim)[:, : attention.rotary_dim]
        rows.copy_((rows + 1.0) * attention.factor - 1.0 if one_plus_weight else rows * attention.factor)
        return scaled

    return edit


def _refuse_unfoldable(text: Any) -> None:
    model_type = str(text.model_type)
    per_head_norms = model_type == "stablelm" and attribute(text, "qk_layernorm", False)
    clipped = attribute(text, "clip_qkv") is not None
    if model_type not in FOLDABLE or per_head_norms or clipped:
        reason = "clips its queries and keys" if clipped else "is not one that folding was shown to be exact for"
        raise UnsupportedModelError(
            f"an attention factor cannot be folded into this model's weights: '{model_type}' {reason}",
            where=model_type,
            hint="Use a method without an attention factor (ntk-by-parts), or YaRN in its stock form.",
        )
