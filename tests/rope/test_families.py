"""Every causal family of the installed transformers: extended right, or refused with the reason; never wrong.

Each family that can be built tiny is built once unscaled and once for every method, with the same weights. What its
extended model computes is compared with a model built from a config written by hand here, from the methods' formulas.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import ORIGINAL_LENGTH, build, buildable, causal_families, run, tiny_family_config
from transformers import (
    CONFIG_MAPPING,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

from ctxext.errors import CtxextError, PositionsNotInEffectError
from ctxext.model.load import quiet
from ctxext.rope.families import Family, base_ropes, classify, has_own_temperature, text_config
from ctxext.rope.patchers import extend_config
from ctxext.rope.verify import rotary_modules, verify_positions

TARGET_LENGTH = 512
METHODS = ("yarn", "linear", "ntk-by-parts")  # the last has no type of its own: it travels as a map

# Families that rotate and cannot be built tiny here, with the reason; the test below keeps this list honest.
UNBUILDABLE: dict[str, str] = {
    "gemma4_assistant": "transformers refuses its own default config",
}
# Random tiny models of these give the same logits whatever their positions are.
INSENSITIVE = {"zaya": "its attention output is normalised away at this size"}
# Extendable families that refuse some of the three methods, and why.
REFUSES: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "gemma4_unified_assistant", "lfm3"),
        (("yarn", "ntk-by-parts"), "proportional RoPE"),
    ),
    "ministral3": (("linear", "ntk-by-parts"), "scales queries"),
}


@functools.cache
def tiny_config(model_type: str) -> PreTrainedConfig | str:
    """The family's tiny config, or why there is none."""
    try:
        return tiny_family_config(model_type)
    except Exception as error:  # a family's own checks; the reason is what we want to know
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


@functools.cache
def family_of(model_type: str) -> Family | None:
    """The classification of the tiny config; None when there is none."""
    config = tiny_config(model_type)
    return None if isinstance(config, str) else classify(config)


@functools.cache
def extendable_families() -> tuple[str, ...]:
    families = {name: family_of(name) for name in causal_families()}
    return tuple(
        name
        for name, family in families.items()
        if family is not None and family.kind != "refused" and name not in UNBUILDABLE
    )


# ---- classification ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", causal_families())
def test_every_family_is_classified(model_type: str) -> None:
    config = tiny_config(model_type)
    if isinstance(config, str):
        config = CONFIG_MAPPING[model_type]() if model_type not in UNBUILDABLE else LlamaConfig()
    family = classify(config)
    assert family.kind in ("flat", "per layer type", "only as map", "refused")
    if family.kind == "refused":
        assert len(family.reason) > 10
        with pytest.raises(CtxextError):
            extend_config(config, target_length=1 << 22, on_existing="replace")


def test_most_families_can_be_extended() -> None:
    kinds = Counter(family.kind for name in causal_families() if (family := family_of(name)) is not None)
    assert kinds["flat"] >= 90
    assert kinds["per layer type"] >= 16
    assert kinds["only as map"] >= 3
    assert sum(kinds.values()) >= 180


def test_the_list_of_unbuildable_families_is_exact() -> None:
    extendable = [name for name in causal_families() if (family := family_of(name)) and family.kind != "refused"]
    without_config = [
        name for name in causal_families() if family_of(name) is None and _default_kind(name) != "refused"
    ]
    unbuildable = {name: buildable(name) for name in extendable if buildable(name) is not None}
    assert set(unbuildable) | set(without_config) == set(UNBUILDABLE), unbuildable


def _default_kind(model_type: str) -> str:
    try:
        return classify(CONFIG_MAPPING[model_type]()).kind
    except Exception:  # a family whose default config transformers itself refuses
        return "unknown"


WITHOUT_ROPE = [
    name for name in causal_families() if (family := family_of(name)) and "no RoPE to rewrite" in family.reason
]


@pytest.mark.parametrize("model_type", WITHOUT_ROPE)
def test_a_family_that_is_said_to_have_no_rope_has_no_rotary_module(model_type: str) -> None:
    config = tiny_config(model_type)
    assert isinstance(config, PreTrainedConfig)
    try:
        model = build(config)
    except Exception as error:  # decoders of encoder-decoder models, above all
        pytest.skip(f"cannot be built alone: {type(error).__name__}")
    assert rotary_modules(model) == []


# ---- every family, every method ------------------------------------------------------------------------------------


@dataclass
class Variants:
    """One family: its tiny config, and models with the same weights for every method that it takes."""

    model_type: str
    config: PreTrainedConfig
    unscaled: PreTrainedModel
    extended: dict[str, tuple[PreTrainedConfig, PreTrainedModel]]

    def rebuilt(self, config: PreTrainedConfig) -> PreTrainedModel:
        model = build(copy.deepcopy(config))
        model.load_state_dict(self.unscaled.state_dict())
        return model


def far_logits(model: PreTrainedModel) -> torch.Tensor:
    """At positions near the target, beyond the original length."""
    return run(model, offset=TARGET_LENGTH - 100)


def methods_of(model_type: str) -> tuple[str, ...]:
    refused = REFUSES.get(model_type, ((), ""))[0]
    return tuple(name for name in METHODS if name not in refused)


def extend(config: PreTrainedConfig, method: str) -> PreTrainedConfig:
    return extend_config(config, method=method, target_length=TARGET_LENGTH, on_existing="replace")


@pytest.fixture(scope="module", params=extendable_families())
def variants(request: pytest.FixtureRequest) -> Variants:
    model_type: str = request.param
    reason = buildable(model_type)
    assert reason is None, f"{model_type} can no longer be built tiny ({reason}): list it in UNBUILDABLE"
    config = tiny_config(model_type)
    assert isinstance(config, PreTrainedConfig)
    unscaled = build(extend_config(_before_scaling(config), method="none", control=True, target_length=TARGET_LENGTH))
    found = Variants(model_type, config, unscaled, {})
    for method in methods_of(model_type):
        extended = extend(config, method)
        found.extended[method] = (extended, found.rebuilt(extended))
    return found


def _before_scaling(config: PreTrainedConfig) -> PreTrainedConfig:
    """A family whose default config is scaled, as it was before."""
    plain = copy.deepcopy(config)
    text: Any = text_config(plain)
    for base in base_ropes(config, on_existing="replace"):
        rope_type = "proportional" if base.proportional else "default"
        unscaled = {"rope_type": rope_type, "rope_theta": base.theta, **dict(base.kept)}
        if "llama_4_scaling_beta" in unscaled:  # Ministral 3's attention reads it whatever the type
            unscaled["original_max_position_embeddings"] = base.original_length
        if base.layer_type is None:
            text.rope_parameters = unscaled
        else:
            text.rope_parameters[base.layer_type] = unscaled
    return plain


def test_positions_are_in_effect(variants: Variants) -> None:
    for method, (config, model) in variants.extended.items():
        result = verify_positions(model, config, TARGET_LENGTH)
        assert result.target_length == TARGET_LENGTH, method
        with pytest.raises(PositionsNotInEffectError):
            verify_positions(variants.unscaled, config, TARGET_LENGTH)


def test_logits_are_finite_and_differ_from_the_unscaled_models(variants: Variants) -> None:
    before = far_logits(variants.unscaled)
    differences = {}
    for method, (_, model) in variants.extended.items():
        after = far_logits(model)
        assert torch.isfinite(after).all(), method
        differences[method] = float((after - before).abs().max())
    if variants.model_type in INSENSITIVE:
        assert max(differences.values()) < 1e-6, "positions matter now: take it off INSENSITIVE"
    else:
        assert min(differences.values()) > 1e-4, differences


def test_a_saved_and_reloaded_model_gives_the_same_logits(variants: Variants, tmp_path: Path) -> None:
    for method, (config, model) in variants.extended.items():
        folder = tmp_path / method
        with quiet():
            model.save_pretrained(folder)
            reloaded = type(model).from_pretrained(folder, attn_implementation=model.config._attn_implementation)
        verify_positions(reloaded, reloaded.config, TARGET_LENGTH)
        verify_positions(reloaded, config, TARGET_LENGTH)
        torch.testing.assert_close(far_logits(reloaded), far_logits(model), rtol=0, atol=1e-6, msg=method)


def by_hand(method: str, config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The extended config as a person would write it from transformers' documentation; None where there is no type.

    YaRN with an attention factor of 1 is NTK-by-parts, which ctxext writes as a map.
    """
    written = copy.deepcopy(config)
    text: Any = text_config(written)
    if classify(config).kind == "only as map":
        return None
    for base in base_ropes(config, on_existing="replace"):
        parameters: dict[str, Any] = {
            "rope_theta": base.theta,
            **dict(base.kept),
            "factor": TARGET_LENGTH / base.original_length,
        }
        if method == "linear":
            parameters["rope_type"] = "proportional" if base.proportional else "linear"
        else:
            parameters |= {"rope_type": "yarn", "original_max_position_embeddings": base.original_length}
            if method == "ntk-by-parts":
                parameters["attention_factor"] = 1.0
            elif has_own_temperature(text):
                parameters |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        if base.layer_type is None:
            text.rope_parameters = parameters
        else:
            text.rope_parameters = {**text.rope_parameters, base.layer_type: parameters}
    text.max_position_embeddings = TARGET_LENGTH
    return written


def test_logits_equal_those_of_a_config_written_by_hand(variants: Variants) -> None:
    compared = 0
    for method, (_, model) in variants.extended.items():
        config = by_hand(method, variants.config)
        if config is None:
            continue
        expected = far_logits(variants.rebuilt(config))
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(far_logits(model), expected, rtol=0, atol=2e-5 * scale, msg=method)
        compared += 1
    family = family_of(variants.model_type)
    assert compared or (family is not None and family.kind == "only as map")


@pytest.mark.parametrize(("model_type", "refusal"), REFUSES.items(), ids=REFUSES)
def test_methods_that_a_family_cannot_carry_are_refused(model_type: str, refusal: tuple[tuple[str, ...], str]) -> None:
    config = tiny_config(model_type)
    assert isinstance(config, PreTrainedConfig)
    for method in refusal[0]:
        with pytest.raises(CtxextError, match=refusal[1]):
            extend(config, method)


# ---- what is peculiar to some families -----------------------------------------------------------------------------


def test_the_softmax_temperature_of_latent_attention_is_verified() -> None:
    config = tiny_config("deepseek_v3")
    assert isinstance(config, DeepseekV3Config)
    extended = extend(config, "yarn")
    model = build(extended)
    assert isinstance(model, DeepseekV3ForCausalLM)
    verify_positions(model, extended)
    attention = model.model.layers[1].self_attn
    assert attention.scaling == pytest.approx((16 + 16) ** -0.5 * 1.1386294361119891**2)
    attention.scaling = (16 + 16) ** -0.5
    with pytest.raises(PositionsNotInEffectError, match=r"layers\.1\.self_attn\.scaling.*got 0\.17"):
        verify_positions(model, extended)


def test_latent_attention_without_yarn_keeps_its_softmax_scale() -> None:
    config = tiny_config("deepseek_v3")
    assert isinstance(config, DeepseekV3Config)
    for method in ("linear", "ntk-by-parts"):
        extended = extend(config, method)
        model: Any = build(extended)
        assert model.model.layers[1].self_attn.scaling == pytest.approx((16 + 16) ** -0.5)
        model.model.layers[0].self_attn.scaling *= 1.2
        with pytest.raises(PositionsNotInEffectError, match="scaling"):
            verify_positions(model, extended)


def test_sliding_window_layers_keep_their_own_rope() -> None:
    config = tiny_config("gemma3_text")
    assert isinstance(config, Gemma3TextConfig)
    extended = extend(config, "yarn")
    assert extended.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]
    assert extended.rope_parameters["full_attention"]["rope_type"] == "yarn"


def test_m_rope_keeps_its_sections() -> None:
    config = tiny_family_config("qwen3_5")
    sections = {"mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
    text_config(config).rope_parameters |= sections
    extended = extend(config, "yarn")
    parameters = text_config(extended).rope_parameters
    assert parameters["rope_type"] == "yarn"
    assert {key: parameters[key] for key in sections} == sections
    model = build(extended)
    verify_positions(model, extended)
    (module,) = rotary_modules(model)
    assert module.module.mrope_section == [1, 1, 0]


def test_phi3_takes_two_range_longrope_in_its_own_form() -> None:
    extended = extend_config(
        tiny_family_config("phi3"),
        method="longrope",
        target_length=TARGET_LENGTH,
        long_factor=[4.0] * 8,
        short_factor=[1.0] * 8,
    )
    assert extended.original_max_position_embeddings == ORIGINAL_LENGTH
    assert extended.rope_parameters["original_max_position_embeddings"] == ORIGINAL_LENGTH
    result = verify_positions(build(extended), extended)
    assert result.attention_factor == pytest.approx(1.1338934190276817)


def test_an_open_head_dim_is_written_out() -> None:
    config = MixtralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    assert config.head_dim is None
    assert extend(config, "yarn").head_dim == 16


# ---- upstream bugs that are worked around: these tests tell when they are fixed ------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TARGET_LENGTH,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}


def yarn_table(config: PreTrainedConfig, layer_type: str | None = None) -> torch.Tensor:
    keywords: dict[str, Any] = {} if layer_type is None else {"layer_type": layer_type}
    frequencies: torch.Tensor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"), **keywords)[0]
    return frequencies


def test_upstream_still_ignores_a_nested_truncate() -> None:
    def table(**setting: bool) -> torch.Tensor:
        local = {"rope_type": "default", "rope_theta": 1e4}
        nested = {"sliding_attention": local, "full_attention": {**YARN, **setting}}
        return yarn_table(Gemma3TextConfig(**SIZES, head_dim=64, rope_parameters=nested), "full_attention")

    flat = [
        yarn_table(LlamaConfig(**SIZES, head_dim=64, rope_parameters={**YARN, "truncate": cut}))
        for cut in (True, False)
    ]
    assert not torch.equal(*flat), "the sizes of this test do not show `truncate` at all"
    assert torch.equal(table(truncate=False), table()), (
        "upstream fixed this: remove the work-around in Yarn.stock_parameters (ctxext/rope/formulas.py)"
    )


def test_a_nested_yarn_without_truncation_travels_as_a_map_instead() -> None:
    config = tiny_config("gemma3_text")
    assert isinstance(config, PreTrainedConfig)
    extended = extend_config(config, method="yarn", target_length=TARGET_LENGTH, truncate=False)
    assert extended.rope_parameters["full_attention"]["rope_type"] == "longrope"
    verify_positions(build(extended), extended)


def test_upstream_yarn_still_crashes_on_an_open_head_dim() -> None:
    try:
        yarn_table(MixtralConfig(**SIZES, rope_parameters=dict(YARN)))
    except TypeError:
        return
    pytest.fail("upstream fixed this: remove the work-around in apply_method (ctxext/rope/patchers.py)")


def test_upstream_dynamic_is_still_switched_off_by_raising_the_maximum() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0}
    init = ROPE_INIT_FUNCTIONS["dynamic"]
    as_base = LlamaConfig(**{**SIZES, "max_position_embeddings": ORIGINAL_LENGTH}, rope_parameters=dict(dynamic))
    raised = LlamaConfig(**SIZES, rope_parameters={**dynamic, "original_max_position_embeddings": ORIGINAL_LENGTH})
    unscaled = init(as_base, torch.device("cpu"), seq_len=ORIGINAL_LENGTH)[0]
    assert not torch.equal(init(as_base, torch.device("cpu"), seq_len=TARGET_LENGTH)[0], unscaled)
    assert torch.equal(init(raised, torch.device("cpu"), seq_len=TARGET_LENGTH)[0], unscaled), (
        "upstream fixed this: remove the work-around in Dynamic.maximum_length (ctxext/rope/formulas.py)"
    )


def in_effect(config: PreTrainedConfig, **changes: Any) -> bool:
    """Whether a model built from the config, after changes of its rope dict, computes what `config` means."""
    changed = copy.deepcopy(config)
    changed.rope_parameters |= changes
    try:
        verify_positions(build(changed), config)
    except PositionsNotInEffectError:
        return False
    return True


def test_upstream_phimoe_still_multiplies_by_mscale_instead_of_the_attention_factor() -> None:
    extended = extend(tiny_family_config("phimoe"), "yarn")
    assert extended.rope_parameters["short_mscale"] == extended.rope_parameters["attention_factor"]
    assert in_effect(extended)
    assert not in_effect(extended, short_mscale=1.0, long_mscale=1.0), (
        "upstream fixed this: remove `takes_mscale` (ctxext/rope/families.py)"
    )


def test_upstream_phimoe_still_never_leaves_the_short_range() -> None:
    config = extend(tiny_family_config("phimoe"), "linear")
    config.rope_parameters |= {"long_factor": [8.0] * 8, "original_max_position_embeddings": ORIGINAL_LENGTH}
    assert not in_effect(config), "upstream fixed this: two-range LongRoPE could be accepted for phimoe"
    with pytest.raises(CtxextError, match="two-range"):
        extend_config(
            tiny_family_config("phimoe"),
            method="longrope",
            target_length=TARGET_LENGTH,
            long_factor=[8.0] * 8,
            short_factor=[1.0] * 8,
        )
