"""The portable form computes what the native one does, on every family that it is offered for, and on no other.

Norms and biases are random here: at their defaults of 1 and 0, folding into the wrong tensor would not show.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from tiny_families import build, buildable, causal_families, run, tiny_family_config
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from ctxext.errors import CtxextError, UnsupportedModelError
from ctxext.rope import portable
from ctxext.rope.families import rope_groups, text_config
from ctxext.rope.patchers import extend_config
from ctxext.rope.portable import FOLDABLE, fold_edits, is_portable, needs_portable_form, portable_config
from ctxext.rope.reference import reference_tables
from ctxext.rope.verify import verify_positions

TARGET = 512
TOLERANCE = 1e-4
# Not offered although a tiny model folds exactly, with the reason.
NOT_OFFERED = {
    "emu3_text_model": "always part of a larger model, which was not tried",
    "mllama_text_model": "its cross-attention layers, which the text model alone lacks, were not tried",
}
# The attention factor does nothing in these, folded or not: a QK-norm follows the rotation and takes it away again.
INERT = ("hunyuan_v1_dense", "hunyuan_v1_moe", "nanochat")


@functools.cache
def text_families() -> dict[str, str]:
    """A causal family for each language model that YaRN extends and that can be built tiny, by its text model_type."""
    found: dict[str, str] = {}
    for name in causal_families():
        try:
            extended = extend_yarn(tiny_family_config(name))
        except Exception:  # refused, or not to be made tiny; tests/rope/test_families.py looks after those
            continue
        model_type = text_config(extended).model_type
        if model_type not in found and buildable(name) is None:
            found[model_type] = name
    return found


def extend_yarn(config: PreTrainedConfig) -> PreTrainedConfig:
    return extend_config(config, method="yarn", target_length=TARGET, on_existing="replace")


def randomised(config: PreTrainedConfig) -> PreTrainedModel:
    model = build(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def with_weights(config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    model = build(copy.deepcopy(config))
    model.load_state_dict(weights)
    return model


def far(model: PreTrainedModel) -> torch.Tensor:
    return run(model, offset=TARGET - 100)


def fold(native: PreTrainedModel, config: PreTrainedConfig) -> tuple[PreTrainedConfig, dict[str, torch.Tensor], int]:
    """The portable config, the folded weights, and how many of them changed."""
    written, factors = portable_config(config)
    weights = {name: tensor.clone() for name, tensor in native.state_dict().items()}
    edits = fold_edits(config, weights, factors)
    weights |= {name: edit(weights[name]) for name, edit in edits.items()}
    return written, weights, len(edits)


def fold_error(model_type: str) -> tuple[float, float, float]:
    """Largest logit difference to native YaRN: of the folded model, of its map without folding, and unscaled."""
    extended = extend_yarn(tiny_family_config(text_families()[model_type]))
    native = randomised(extended)
    expected = far(native)
    written, weights, edits = fold(native, extended)
    assert edits >= 2
    folded = with_weights(written, weights)
    verify_positions(folded, written)
    unfolded = with_weights(written, native.state_dict())
    unscaled = copy.deepcopy(written)
    for parameters in rope_groups(unscaled).values():
        if parameters.get("rope_type") == "longrope":
            parameters |= dict.fromkeys(("short_factor", "long_factor"), [1.0] * len(parameters["long_factor"]))
    others = (folded, unfolded, with_weights(unscaled, native.state_dict()))
    folded_error, unfolded_error, unscaled_error = (float((far(other) - expected).abs().max()) for other in others)
    return folded_error, unfolded_error, unscaled_error


@pytest.mark.parametrize("model_type", FOLDABLE)
def test_the_folded_model_computes_what_native_yarn_does(model_type: str) -> None:
    assert model_type in text_families(), "listed as foldable, but it cannot be built tiny: nobody has seen it fold"
    folded, unfolded, unscaled = fold_error(model_type)
    assert folded < TOLERANCE
    assert unscaled > 10 * TOLERANCE, "this model does not show whether it is scaled"
    if model_type in INERT:
        assert unfolded < TOLERANCE
    else:
        assert unfolded > 10 * TOLERANCE, "this model does not show whether the attention factor is there"


def test_no_foldable_family_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "_refuse_unfoldable", lambda text: None)
    left_out = {}
    for model_type in sorted(set(text_families()) - set(FOLDABLE)):
        try:
            error, without, _ = fold_error(model_type)
        except Exception:  # what cannot be folded may fail in any way
            continue
        if error < TOLERANCE < without / 10:
            left_out[model_type] = error
    if set(left_out) != set(NOT_OFFERED):
        warnings.warn(f"these families would fold exactly and are not in FOLDABLE: {left_out}", stacklevel=1)


# ---- the config ----------------------------------------------------------------------------------------------------

TINY_LLAMA = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def llama() -> LlamaConfig:
    return LlamaConfig(**TINY_LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 1e4})


@pytest.mark.parametrize("method", ["linear", "ntk-by-parts", "llama3", "resonance", "yarn"])
def test_the_portable_config_means_the_same_frequencies(method: str) -> None:
    extended = extend_config(llama(), method=method, target_length=TARGET)
    before = copy.deepcopy(extended.to_dict())
    written, factors = portable_config(extended)
    assert extended.to_dict() == before
    native, carried = reference_tables(extended)[None], reference_tables(written)[None]
    torch.testing.assert_close(torch.tensor(carried.inv_freq), torch.tensor(native.inv_freq), rtol=1e-6, atol=0)
    assert carried.attention_factor == 1.0
    assert factors.get(None, 1.0) == native.attention_factor
    parameters = written.rope_parameters
    assert is_portable(parameters)
    assert parameters["original_max_position_embeddings"] == written.max_position_embeddings == TARGET


def test_an_unscaled_config_stays_as_it_is() -> None:
    written, factors = portable_config(llama())
    assert written.rope_parameters == llama().rope_parameters
    assert factors == {}


def test_only_what_readers_get_wrong_needs_the_portable_form() -> None:
    def parameters(**settings: Any) -> dict[str, Any]:
        rope: dict[str, Any] = extend_config(llama(), target_length=TARGET, **settings).rope_parameters
        return rope

    factors = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 3.8, 4.0]
    for settings in ({"method": "linear"}, {"method": "yarn"}, {"method": "llama3"}, {"method": "ntk-by-parts"}):
        assert not needs_portable_form(parameters(**settings)), settings
    for settings in (
        {"method": "yarn", "attention_factor": 1.3},
        {"method": "longrope", "long_factor": factors},
        {"method": "resonance"},
    ):
        assert needs_portable_form(parameters(**settings)), settings
        written, _ = portable_config(extend_config(llama(), target_length=TARGET, **settings), force=False)
        assert is_portable(written.rope_parameters)
    unforced, none = portable_config(extend_config(llama(), target_length=TARGET), force=False)
    assert unforced.rope_parameters["rope_type"] == "yarn"
    assert none == {}


def test_folding_touches_the_queries_and_keys_of_full_attention_layers_alone() -> None:
    extended = extend_yarn(tiny_family_config("gemma3_text"))
    names = list(build(extended).state_dict())
    edits = fold_edits(extended, names, portable_config(extended)[1])
    full = extended.layer_types.index("full_attention")
    assert sorted(edits) == [f"model.layers.{full}.self_attn.{part}_norm.weight" for part in ("k", "q")]


def test_only_rotary_rows_are_scaled() -> None:
    extended = extend_yarn(tiny_family_config("phi"))
    model = build(extended)
    factors = portable_config(extended)[1]
    edits = fold_edits(extended, model.state_dict(), factors)
    weight = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    ratios = (edits["model.layers.0.self_attn.q_proj.weight"](weight) / weight).view(4, 16, -1)
    torch.testing.assert_close(ratios[:, :8], torch.full_like(ratios[:, :8], factors[None]))
    torch.testing.assert_close(ratios[:, 8:], torch.ones_like(ratios[:, 8:]))
    assert not any("v_proj" in name or "dense" in name for name in edits)


def test_layers_without_positions_are_left_alone() -> None:
    extended = extend_yarn(tiny_family_config("smollm3", no_rope_layers=[1, 0]))
    native = randomised(extended)
    written, weights, edits = fold(native, extended)
    assert edits == 2
    assert all("layers.0." in name for name in _changed(native, weights))
    torch.testing.assert_close(far(with_weights(written, weights)), far(native), rtol=0, atol=TOLERANCE)


def _changed(native: PreTrainedModel, weights: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in native.state_dict().items() if not torch.equal(tensor, weights[name])]


def tiny_llava() -> tuple[LlavaConfig, PreTrainedModel]:
    """A Llama behind a vision tower whose attention weights have the same names as the Llama's."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = LlavaConfig(text_config=LlamaConfig(**TINY_LLAMA), vision_config=vision, image_token_id=3)
    extended = extend_config(config, target_length=TARGET)
    torch.manual_seed(0)
    return extended, LlavaForConditionalGeneration(copy.deepcopy(extended)).eval()


def test_a_vision_tower_with_the_same_names_is_left_alone() -> None:
    extended, native = tiny_llava()
    written, factors = portable_config(extended)
    weights = native.state_dict()
    edits = fold_edits(extended, weights, factors)
    assert len(edits) == 4
    assert all("language_model" in name for name in edits)
    folded = LlavaForConditionalGeneration(copy.deepcopy(written)).eval()
    folded.load_state_dict({name: edits[name](tensor) if name in edits else tensor for name, tensor in weights.items()})
    torch.testing.assert_close(far(folded), far(native), rtol=0, atol=TOLERANCE)


def test_towers_that_cannot_be_told_apart_are_refused() -> None:
    names = [
        f"{tower}.layers.{layer}.self_attn.{part}_proj.weight" for tower in "ab" for layer in (0, 1) for part in "qk"
    ]
    with pytest.raises(UnsupportedModelError, match="which of the model's towers reads text"):
        fold_edits(extend_yarn(llama()), names, {None: 1.1})


# ---- refusals ------------------------------------------------------------------------------------------------------


def two_ranges() -> PreTrainedConfig:
    return extend_config(
        llama(), method="longrope", target_length=TARGET, long_factor=[4.0] * 8, short_factor=[1.0] * 8
    )


def clipped() -> PreTrainedConfig:
    config = extend_yarn(tiny_family_config("olmo"))
    config.clip_qkv = 8.0
    return config


def unknown() -> PreTrainedConfig:
    config = extend_yarn(llama())
    config.model_type = "unheard_of"
    return config


REFUSED = {
    "two ranges": (two_ranges, "got 'longrope with two ranges'"),
    "dynamic": (lambda: extend_config(llama(), method="dynamic", target_length=TARGET), "no single table.*'dynamic'"),
    "latent attention with a temperature": (
        lambda: extend_yarn(tiny_family_config("deepseek_v3")),
        "softmax scale from YaRN's stock form",
    ),
    "clipped queries and keys": (clipped, "clips its queries and keys"),
    "norms of every head": (lambda: extend_yarn(tiny_family_config("stablelm", qk_layernorm=True)), "'stablelm'"),
    "an unknown family": (unknown, "'unheard_of' is not one that folding was shown to be exact for"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_portable_form_is_refused_with_the_reason(config: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        portable_config(config())


@pytest.mark.parametrize("config", [clipped, unknown], ids=["clipped", "unknown"])
def test_without_an_attention_factor_nothing_needs_folding(config: Any) -> None:
    plain = copy.deepcopy(config())
    plain.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    written, factors = portable_config(plain)
    assert factors == {}
    assert is_portable(written.rope_parameters)


def test_a_layer_whose_weights_are_missing_is_refused() -> None:
    extended = extend_yarn(llama())
    names = [name for name in build(extended).state_dict() if "layers.1.self_attn" not in name]
    with pytest.raises(UnsupportedModelError, match="query and key weights were not found"):
        fold_edits(extended, names, {None: 1.1})


@pytest.mark.parametrize("part", ["q_proj", "k_proj"])
def test_a_layer_with_only_one_of_query_and_key_is_refused(part: str) -> None:
    extended = extend_yarn(llama())
    names = [name for name in build(extended).state_dict() if f"layers.1.self_attn.{part}" not in name]
    with pytest.raises(CtxextError, match="not found"):
        fold_edits(extended, names, {None: 1.1})
