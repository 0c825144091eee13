"""What an architecture's RoPE is, read from its config: which layers can be extended, how, or why not.

The config is a transformers config object, but nothing here imports transformers: only attributes are read. The rule
is *right or refused*: what is read here is compared with the rotary modules of the live model afterwards
(`ctxext/rope/verify.py`), so a family that computes its RoPE in a way not foreseen here fails there, loudly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ctxext.errors import CtxextError, UnsupportedModelError
from ctxext.rope.base import BaseRope
from ctxext.rope.methods import READABLE_TYPES, Linear, table_from_rope_parameters

OnExisting = Literal["refuse", "replace", "compose"]

# Architectures without rotary positions, by model_type: what they use instead.
_WITHOUT_ROPE = {
    **dict.fromkeys(
        "bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small camembert "
        "data2vec-text electra ernie git gpt2 gpt_bigcode gpt_neo mbart megatron-bert mvp openai-gpt opt plbart "
        "prophetnet rembert roberta roberta-prelayernorm roc_bert xlm xlm-roberta xlm-roberta-xl xmod".split(),
        "learned absolute positions",
    ),
    **dict.fromkeys(
        "blenderbot ctrl marian musicgen_decoder musicgen_melody_decoder pegasus xglm".split(),
        "sinusoidal absolute positions",
    ),
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "cpmant": "learned relative positions",
    "reformer": "axial absolute positions",
    "trocr": "absolute positions",
    "whisper": "absolute positions",
    "xlnet": "relative positions",
    "falcon_mamba": "no positions (a state-space model)",
    "mamba": "no positions (a state-space model)",
    "mamba2": "no positions (a state-space model)",
    "rwkv": "no positions (a recurrent model)",
    "xlstm": "no positions (a recurrent model)",
    "jamba": "no positions (attention layers without, beside state-space layers)",
    "kimi_linear": "no positions (attention layers without, beside linear ones)",
    "nemotron_h": "no positions (attention layers without, beside state-space layers)",
    "zamba": "no positions (attention layers without, beside state-space layers)",
}
# They rotate, but with sinusoid buffers of their own that no rope config reaches.
_OWN_SINUSOIDS = ("codegen", "gptj", "roformer")

# They rotate in a way that one rewritten table does not extend, by model_type: why.
_OTHERWISE_BUILT = {
    "deepseek_v4": "its compressed attention rotates block positions by a second table of its own",
    "granite_swa": "every layer may have another RoPE base (`layer_rope_theta`), outside rope_parameters",
    "granitemoe_swa": "every layer may have another RoPE base (`layer_rope_theta`), outside rope_parameters",
    "recurrent_gemma": "its attention layers see only a sliding window; the recurrent layers carry the rest",
    "blt": "its byte encoder, patch model and decoder have a RoPE each",
    "dots3_note_text": "its layers differ in their latent attention, which YaRN's temperature depends on",
    "dbrx": "its RoPE base lies in attn_config, outside rope_parameters",
    "moshi": "its config's RoPE is shared with an audio decoder",
}

# Full-attention layers of these have no positions at all; only sliding or chunked layers rotate.
_ROTATES_ONLY_LOCALLY = (
    "afmoe",
    "cohere2",
    "cohere2_moe",
    "exaone4",
    "exaone_moe",
    "flint",
    "kolibri1",
    "llama4_text",
)
# Their rotary module exists only with this setting.
_ROTATES_ONLY_IF: dict[str, tuple[str, Any]] = {
    "granitemoehybrid": ("position_embedding_type", "rope"),
    "zamba2": ("use_mem_rope", True),
}
_LOCAL_LAYERS = ("sliding_attention", "chunked_attention", "hybrid_sliding")
# transformers accepts only `longrope` as a scaled type for them; a map is one.
_LONGROPE_ONLY = ("phi3", "phi4_multimodal", "phimoe")

# Keys of a rope dict that describe its scaling; all other keys are the architecture's own and are kept.
_SCALING_KEYS = frozenset(
    "rope_type type rope_theta factor original_max_position_embeddings attention_factor beta_fast beta_slow "
    "short_factor long_factor short_mscale long_mscale low_freq_factor high_freq_factor mscale mscale_all_dim truncate "
    "finetuned max_position_embeddings".split()
)

_HINT_NO_ROPE = "Choose a model with rotary positions (Llama, Qwen, Mistral, Gemma, SmolLM ...)."


@dataclass(frozen=True)
class Family:
    """How a model's RoPE can be extended.

    Attributes:
        model_type: of the language model's part of the config.
        kind: `flat` (one RoPE), `per layer type` (full-attention layers are extended, others stay), `only as map`
            (transformers takes no other scaled type), `refused`.
        reason: why it is refused, or what else a user must know.
    """

    model_type: str
    kind: Literal["flat", "per layer type", "only as map", "refused"]
    reason: str = ""


def text_config(config: Any) -> Any:
    """The language model's part of a config (itself unless the model is multimodal).

    Raises:
        UnsupportedModelError: the config holds several language models.
    """
    try:
        return config.get_text_config()
    except ValueError as error:
        raise UnsupportedModelError(
            "the config holds several language models, and does not say which one to extend",
            where=str(getattr(config, "model_type", "model")),
        ) from error


def attribute(text: Any, name: str, default: Any = None) -> Any:
    """A config attribute, or the default where it is missing or differs between layers (Gemma 4's head_dim)."""
    try:
        return getattr(text, name, default)
    except (AttributeError, RuntimeError, ValueError):
        return default


def classify(config: Any) -> Family:
    """How the model of this config can be extended; never raises for a config that transformers made."""
    model_type = str(getattr(config, "model_type", "unknown"))
    try:
        text = text_config(config)
        model_type = str(getattr(text, "model_type", model_type))
        bases = base_ropes(config, on_existing="replace")
    except CtxextError as error:
        return Family(model_type, "refused", error.what)
    if model_type in _LONGROPE_ONLY:
        return Family(model_type, "only as map", "transformers takes no scaled type but longrope")
    if bases[0].layer_type is not None:
        extended = {base.layer_type for base in bases}
        left = sorted(str(layer_type) for layer_type in _groups(text) if layer_type not in extended)
        notes = [f"left as they are: {', '.join(left)}"] if left else []
        if any(base.proportional for base in bases):
            notes.append("proportional RoPE: only linear extends it")
        return Family(model_type, "per layer type", "; ".join(notes))
    return Family(model_type, "flat", _flat_note(text, bases[0]))


def _flat_note(text: Any, base: BaseRope) -> str:
    notes = []
    if base.own_temperature:
        notes.append("multi-head latent attention: YaRN sets its softmax scale through mscale_all_dim")
    if dict(base.kept).get("partial_rotary_factor", 1.0) != 1.0:
        notes.append(f"partial rotary: {base.rotary_dim} dimensions of a head turn")
    if "llama_4_scaling_beta" in dict(base.kept):
        notes.append("only yarn and llama3, whose dict keeps the original length that its queries are scaled by")
    layers = set(getattr(text, "layer_types", None) or ())
    if layers & set(_LOCAL_LAYERS):
        notes.append("sliding-window layers share the same RoPE")
    elif getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        notes.append(f"every layer sees only {text.sliding_window} positions back")
    return "; ".join(notes)


def base_ropes(config: Any, on_existing: OnExisting = "refuse") -> list[BaseRope]:
    """The RoPE of every group of layers that extension rewrites (one group when the config is flat).

    Args:
        on_existing: what to do about a RoPE that is scaled already: refuse; `replace` the scaling, starting from the
            length before it; or `compose`, starting from the scaled frequencies and the length that they reach.

    Raises:
        UnsupportedModelError: the model has no RoPE, one that ctxext cannot extend correctly, or one that is scaled
            already.
    """
    text = text_config(config)
    model_type = str(getattr(text, "model_type", "unknown"))
    _refuse_without_rope(text, model_type)
    _refuse_otherwise_built(text, model_type)
    bases = [
        _base_rope(text, parameters, layer_type, model_type, on_existing)
        for layer_type, parameters in _groups(text).items()
        if parameters is not None and layer_type not in _LOCAL_LAYERS
    ]
    if not bases:
        raise UnsupportedModelError(
            "only sliding-window layers rotate; the full-attention layers have no positions, so no rewrite is needed",
            where=f"{model_type}.rope_parameters",
            got=", ".join(str(key) for key in _groups(text)),
        )
    return bases


def _groups(text: Any) -> dict[str | None, dict[str, Any] | None]:
    """The rope dicts by layer type; {None: dict} when flat. A value of None is a layer type without positions."""
    parameters: dict[str, Any] = text.rope_parameters
    labels = getattr(text, "_rope_type_labels", None) or getattr(text, "layer_types", None) or ()
    nested: dict[str | None, dict[str, Any] | None] = {
        key: value for key, value in parameters.items() if key in labels or isinstance(value, dict)
    }
    return nested or {None: parameters}


def rope_groups(config: Any) -> dict[str | None, dict[str, Any]]:
    """Every rope dict of a config by layer type (None when flat), layer types without positions left out.

    Raises:
        UnsupportedModelError: the config shows no RoPE.
    """
    text = text_config(config)
    if not getattr(text, "rope_parameters", None):
        raise UnsupportedModelError("the config shows no rotary positions", where=str(text.model_type))
    groups = {key: value for key, value in _groups(text).items() if value is not None}
    # A default config may describe layer types that this model has no layer of.
    present = set(getattr(text, "layer_types", None) or groups)
    return {key: value for key, value in groups.items() if key in present} or groups


def _base_rope(
    text: Any, parameters: dict[str, Any], layer_type: str | None, model_type: str, on_existing: OnExisting
) -> BaseRope:
    where = ".".join(part for part in (model_type, "rope_parameters", layer_type) if part)
    rope_type = parameters.get("rope_type", "default")
    proportional = rope_type == "proportional"
    if rope_type not in READABLE_TYPES:
        raise UnsupportedModelError(
            "the model's RoPE is of a kind that ctxext does not know",
            where=f"{where}.rope_type",
            got=str(rope_type),
            expected=f"one of {', '.join(READABLE_TYPES)}",
        )
    theta = parameters.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not math.isfinite(theta) or theta <= 1:
        raise UnsupportedModelError(
            "the config does not say its RoPE base",
            where=f"{where}.rope_theta",
            got=theta,
            expected="a number above 1",
        )
    base = BaseRope(
        theta=float(theta),
        rotary_dim=rotary_dim(text, parameters, layer_type),
        original_length=original_length(text),
        layer_type=layer_type,
        kept=kept_entries(parameters),
        own_temperature=has_own_temperature(text),
        proportional=proportional,
    )
    if rope_type == "default" or (proportional and parameters.get("factor", 1.0) == 1.0):
        return base
    return _already_scaled(text, parameters, base, where, on_existing)


def kept_entries(parameters: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The entries of a rope dict that are the architecture's own and not part of its scaling."""
    return tuple((key, value) for key, value in parameters.items() if key not in _SCALING_KEYS and value is not None)


def _already_scaled(
    text: Any, parameters: dict[str, Any], base: BaseRope, where: str, on_existing: OnExisting
) -> BaseRope:
    rope_type, reach = parameters["rope_type"], base.original_length
    before = parameters.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    if rope_type == "dynamic":
        before = reach  # it reads max_position_embeddings as the original length
    elif before is None and parameters.get("factor"):
        before = round(reach / float(parameters["factor"]))
    # A map names its maximum as its original length: what lay below it stands only in ctxext.json.
    hides_original = rope_type == "longrope" and before == reach
    if hides_original and on_existing != "compose":
        raise UnsupportedModelError(
            "the model's RoPE is already scaled, by a frequency map that no longer shows the length before it",
            where=f"{where}.rope_type",
            got=rope_type,
            hint="Extend the base model that its ctxext.json names; or on_existing: compose keeps the map and starts "
            f"from the {reach} positions that it reaches.",
        )
    if on_existing == "refuse":
        raise UnsupportedModelError(
            "the model's RoPE is already scaled",
            where=f"{where}.rope_type",
            got=rope_type,
            expected="'default' (an unscaled base model), or a choice in on_existing",
            hint=f"on_existing: replace drops its scaling and starts from {before} positions with theta "
            f"{base.theta:g}; on_existing: compose keeps it and starts from the {reach} positions that it reaches.",
        )
    if before is None:
        raise UnsupportedModelError(
            "the config does not say the length before its scaling",
            where=f"{where}.original_max_position_embeddings",
            got=None,
            expected="a positive integer",
        )
    unscaled = _with_length(base, int(before))
    if on_existing == "replace":
        return unscaled
    if rope_type == "dynamic":
        raise UnsupportedModelError(
            "dynamic scaling has no fixed frequencies to compose with",
            where=f"{where}.rope_type",
            got="dynamic",
            hint="on_existing: replace starts from the model before it.",
        )
    lost = None
    if base.own_temperature and parameters.get("mscale_all_dim"):
        lost = "its latent attention takes a softmax scale from the YaRN it has, which a composed RoPE would lose"
    if base.proportional:
        lost = "its proportional RoPE is defined by one factor alone"
    if lost is not None:
        raise UnsupportedModelError(
            f"the model's scaling cannot be composed with another: {lost}",
            where=f"{where}.rope_type",
            got=rope_type,
            hint="on_existing: replace starts from the model before it.",
        )
    table = table_from_rope_parameters(parameters, unscaled, reach)
    if table.short_inv_freq is not None:
        raise UnsupportedModelError(
            "two-range LongRoPE has no single set of frequencies to compose with",
            where=f"{where}.short_factor",
            hint="on_existing: replace starts from the model before it.",
        )
    return BaseRope(
        theta=base.theta,
        rotary_dim=base.rotary_dim,
        original_length=reach,
        layer_type=base.layer_type,
        kept=base.kept,
        frequencies=tuple(float(value) for value in np.asarray(table.inv_freq, dtype=np.float64)),
        attention_factor=table.attention_factor,
        own_temperature=base.own_temperature,
    )


def _with_length(base: BaseRope, length: int) -> BaseRope:
    return replace(base, original_length=length)


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


def length_before_scaling(config: Any) -> int:
    """The length below whatever scaling a config shows; `max_position_embeddings` when it shows none."""
    lengths = [
        int(parameters["original_max_position_embeddings"])
        for parameters in rope_groups(config).values()
        if parameters.get("original_max_position_embeddings")
    ]
    return min([original_length(config), *lengths])


def head_dim(text: Any, layer_type: str | None = None) -> int:
    """Dimensions of a head that RoPE is given, before `partial_rotary_factor`."""
    layer_config, views = text, attribute(text, "per_layer_config")
    if layer_type is not None and views is not None and attribute(text, "head_dim") is None:
        layer_config = views[layer_type]
    return int(attribute(layer_config, "head_dim") or text.hidden_size // text.num_attention_heads)


def rotary_dim(text: Any, parameters: dict[str, Any], layer_type: str | None = None) -> int:
    """How many dimensions of a head one table rotates.

    Raises:
        UnsupportedModelError: an odd number.
    """
    if parameters.get("rope_type") == "proportional":
        return head_dim(text, layer_type)
    dimensions = int(head_dim(text, layer_type) * (parameters.get("partial_rotary_factor") or 1.0))
    if dimensions < 2 or dimensions % 2:
        raise UnsupportedModelError(
            "the rotated part of a head must be even",
            where=f"{text.model_type}.head_dim",
            got=dimensions,
        )
    return dimensions


def has_own_temperature(text: Any) -> bool:
    """Whether attention is multi-head latent attention, which scales its softmax by `mscale_all_dim` itself."""
    return bool(attribute(text, "kv_lora_rank") and attribute(text, "qk_rope_head_dim"))


def takes_only_maps(text: Any) -> bool:
    """Whether transformers accepts no scaled type but `longrope` for this family."""
    return text.model_type in _LONGROPE_ONLY


def takes_mscale(text: Any) -> bool:
    """Whether the family multiplies cos and sin by `short_mscale` and `long_mscale` instead (PhiMoE)."""
    return bool(text.model_type == "phimoe")


def check_method(base: BaseRope, method_name: str) -> None:
    """Refuse a method that this kind of RoPE cannot carry.

    Raises:
        UnsupportedModelError: the family's `proportional` type, which only linear scaling fits.
    """
    if base.proportional and method_name not in ("none", Linear.model_fields["method"].default):
        raise UnsupportedModelError(
            "this model's full-attention layers have a proportional RoPE, which only a linear factor can extend",
            where="rope.method",
            got=method_name,
            expected="linear",
        )


def check_parameters(base: BaseRope, parameters: dict[str, Any]) -> None:
    """Refuse a dict that would change more of the model than its rotation.

    Raises:
        UnsupportedModelError: Ministral 3 scales its queries by position, with the original length from this dict.
    """
    if "llama_4_scaling_beta" in parameters and (
        parameters.get("original_max_position_embeddings") != base.original_length
    ):
        raise UnsupportedModelError(
            "this model's attention scales queries by the dict's original length, which this method does not keep",
            where=f"rope_parameters.{parameters['rope_type']}",
            expected="yarn or llama3",
        )


def _refuse_without_rope(text: Any, model_type: str) -> None:
    instead = _WITHOUT_ROPE.get(model_type)
    if instead is None and getattr(text, "alibi", False):
        instead = "ALiBi"
    if instead is None and model_type in _OWN_SINUSOIDS:
        raise UnsupportedModelError(
            f"'{model_type}' computes its rotation from buffers of its own, which no config reaches",
            where="model",
            hint=_HINT_NO_ROPE,
        )
    if instead is None and not getattr(text, "rope_parameters", None):
        instead = "no rotary positions that its config shows"
    if instead is not None:
        raise UnsupportedModelError(
            f"'{model_type}' uses {instead}: there is no RoPE to rewrite", where="model", hint=_HINT_NO_ROPE
        )


def _refuse_otherwise_built(text: Any, model_type: str) -> None:
    reason = _OTHERWISE_BUILT.get(model_type)
    if model_type in _ROTATES_ONLY_LOCALLY and _has_local_layers(text):
        reason = "only its sliding-window or chunked layers rotate; full-attention layers have no positions"
    if (
        model_type in _ROTATES_ONLY_IF
        and attribute(text, _ROTATES_ONLY_IF[model_type][0]) != _ROTATES_ONLY_IF[model_type][1]
    ):
        name, wanted = _ROTATES_ONLY_IF[model_type]
        reason = f"it has no rotary module unless its config says {name}: {wanted}"
    if reason is not None:
        raise UnsupportedModelError(f"'{model_type}' cannot be extended by rewriting one RoPE: {reason}", where="model")


def _has_local_layers(text: Any) -> bool:
    return bool(set(getattr(text, "layer_types", None) or ()) & set(_LOCAL_LAYERS))
