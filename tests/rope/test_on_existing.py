"""A model that is scaled already: refused with the numbers of each choice, replaced from the length before its
scaling, or composed with it, by formulas written out here."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import build, tiny_family_config
from transformers import AutoModelForCausalLM, LlamaConfig

from ctxext.errors import UnsupportedModelError, UsageError
from ctxext.model.load import quiet
from ctxext.rope.families import base_ropes
from ctxext.rope.patchers import extend_config
from ctxext.rope.reference import reference_tables
from ctxext.rope.verify import verify_positions

THETA, DIM = 1e4, 32
BEFORE, REACH, TARGET = 256, 1024, 4096
UNSCALED = THETA ** (-np.arange(0, DIM, 2) / DIM)

SCALED: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": BEFORE,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": BEFORE},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": BEFORE,
        "short_factor": [1.0 + index / 5 for index in range(16)],
        "long_factor": [1.0 + index / 5 for index in range(16)],
    },
}
scaled = pytest.mark.parametrize("kind", SCALED)


def llama(kind: str | None, **changes: Any) -> LlamaConfig:
    rope = {"rope_type": "default"} if kind is None else SCALED[kind]
    return LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=DIM,
        max_position_embeddings=BEFORE if kind is None else REACH,
        rope_parameters={**rope, "rope_theta": THETA, **changes},
    )


def frequencies(config: LlamaConfig) -> Any:
    """As a model built from the config has them."""
    model: Any = build(copy.deepcopy(config))
    verify_positions(model, config)
    return model.model.rotary_emb.inv_freq.numpy().astype(np.float64)


def attention_factor(config: LlamaConfig) -> float:
    return reference_tables(config)[None].attention_factor


def llama3_by_hand(length: int, factor: float) -> Any:
    """Meta's `apply_scaling`, frequency by frequency."""
    result = []
    for frequency in UNSCALED:
        wavelength = 2 * math.pi / frequency
        if wavelength < length / 4.0:
            result.append(frequency)
        elif wavelength > length / 1.0:
            result.append(frequency / factor)
        else:
            smooth = (length / wavelength - 1.0) / (4.0 - 1.0)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.asarray(result)


# ---- refuse --------------------------------------------------------------------------------------------------------


@scaled
def test_refusing_is_the_default_and_shows_the_numbers_of_each_choice(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="already scaled") as caught:
        extend_config(llama(kind), target_length=TARGET)
    message = str(caught.value)
    assert f"got '{kind}'" in message
    assert f"replace drops its scaling and starts from {BEFORE} positions with theta 10000" in message
    assert f"compose keeps it and starts from the {REACH} positions that it reaches" in message


# ---- replace -------------------------------------------------------------------------------------------------------


@scaled
def test_replace_starts_from_the_model_before_its_scaling(kind: str) -> None:
    replaced = extend_config(llama(kind), target_length=TARGET, on_existing="replace")
    from_the_base = extend_config(llama(None), target_length=TARGET)
    assert replaced.rope_parameters == from_the_base.rope_parameters
    assert replaced.max_position_embeddings == TARGET
    assert replaced.rope_parameters["factor"] == TARGET / BEFORE


def test_replace_does_not_reach_below_the_length_before() -> None:
    shorter = extend_config(llama("llama3"), target_length=REACH // 2, on_existing="replace")
    assert shorter.rope_parameters["factor"] == 2.0
    with pytest.raises(UsageError, match=f"more than {BEFORE}"):
        extend_config(llama("llama3"), target_length=BEFORE, on_existing="replace")


# ---- compose -------------------------------------------------------------------------------------------------------


def test_linear_on_linear_is_their_product() -> None:
    config = extend_config(llama("linear"), method="linear", target_length=TARGET, on_existing="compose")
    np.testing.assert_allclose(frequencies(config), UNSCALED / 16, rtol=3e-6)
    assert attention_factor(config) == 1.0


def test_ntk_on_linear_divides_the_slowest_by_both_factors() -> None:
    config = extend_config(llama("linear"), method="ntk", target_length=TARGET, on_existing="compose")
    grown = (THETA * 4 ** (DIM / (DIM - 2))) ** (-np.arange(0, DIM, 2) / DIM)
    np.testing.assert_allclose(frequencies(config), grown / 4, rtol=3e-6)
    assert frequencies(config)[-1] == pytest.approx(UNSCALED[-1] / 16, rel=1e-5)


def test_linear_on_llama3_divides_what_llama3_made() -> None:
    config = extend_config(llama("llama3"), method="linear", target_length=TARGET, on_existing="compose")
    np.testing.assert_allclose(frequencies(config), llama3_by_hand(BEFORE, 4.0) / 4, rtol=3e-6)


def test_yarn_on_llama3_ramps_by_the_turns_of_the_scaled_frequencies() -> None:
    config = extend_config(llama("llama3"), target_length=TARGET, on_existing="compose")
    before = llama3_by_hand(BEFORE, 4.0)
    turns = REACH * before / (2 * math.pi)

    def index_of(wanted: float) -> float:
        after = next(index for index, value in enumerate(turns) if value < wanted)
        upper, lower = math.log(turns[after - 1]), math.log(turns[after])
        return after - 1 + (upper - math.log(wanted)) / (upper - lower)

    low, high = math.floor(index_of(32.0)), math.ceil(index_of(1.0))
    assert 0 < low < high < 15
    ramp = np.clip((np.arange(16) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(frequencies(config), before / 4 * ramp + before * (1 - ramp), rtol=3e-6)
    assert attention_factor(config) == pytest.approx(0.1 * math.log(4) + 1)


def test_attention_factors_multiply() -> None:
    config = extend_config(llama("yarn"), target_length=TARGET, on_existing="compose")
    assert attention_factor(config) == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    parts = extend_config(llama("yarn"), method="ntk-by-parts", target_length=TARGET, on_existing="compose")
    assert attention_factor(parts) == pytest.approx(0.1 * math.log(4) + 1)


@scaled
@pytest.mark.parametrize("method", ["yarn", "linear", "ntk", "llama3", "ntk-by-parts"])
def test_a_composed_model_survives_saving(kind: str, method: str, tmp_path: Path) -> None:
    config = extend_config(llama(kind), method=method, target_length=TARGET, on_existing="compose")
    assert config.max_position_embeddings == TARGET
    assert config.rope_parameters["rope_type"] == "longrope"
    model = build(copy.deepcopy(config))
    with quiet():
        model.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    result = verify_positions(reloaded, config)
    assert result.target_length == TARGET
    verify_positions(reloaded, reloaded.config)


@scaled
def test_composing_starts_from_what_the_model_computes_today(kind: str) -> None:
    (base,) = base_ropes(llama(kind), on_existing="compose")
    model: Any = build(llama(kind))
    np.testing.assert_allclose(base.inv_freq(), model.model.rotary_emb.inv_freq.numpy(), rtol=3e-6)
    assert base.attention_factor == pytest.approx(model.model.rotary_emb.attention_scaling)
    assert base.original_length == REACH


def test_twice_extended_is_extended_twice() -> None:
    once = extend_config(llama(None), method="linear", target_length=REACH)
    twice = extend_config(once, method="linear", target_length=TARGET, on_existing="compose")
    thrice = extend_config(twice, method="linear", target_length=2 * TARGET, on_existing="compose")
    np.testing.assert_allclose(frequencies(thrice), UNSCALED / 32, rtol=3e-6)


def two_ranges() -> LlamaConfig:
    return extend_config(
        llama(None), method="longrope", target_length=REACH, long_factor=[4.0] * 16, short_factor=[1.0] * 16
    )


def proportional() -> Any:
    return extend_config(tiny_family_config("gemma4_text"), method="linear", target_length=512)


def latent_attention() -> Any:
    return extend_config(tiny_family_config("deepseek_v3"), target_length=512)


NOT_COMPOSABLE = {
    "dynamic": (lambda: extend_config(llama(None), method="dynamic", target_length=REACH), "no fixed frequencies"),
    "two ranges": (two_ranges, "two-range LongRoPE has no single set"),
    "latent attention with a temperature": (latent_attention, "softmax scale"),
    "proportional": (proportional, "proportional"),
}


@pytest.mark.parametrize(("config", "message"), NOT_COMPOSABLE.values(), ids=NOT_COMPOSABLE.keys())
def test_what_cannot_be_composed_is_refused_and_can_be_replaced(config: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        extend_config(config(), method="linear", target_length=TARGET, on_existing="compose")
    extended = extend_config(config(), method="linear", target_length=TARGET, on_existing="replace")
    verify_positions(build(extended), extended)


# ---- the control arm -----------------------------------------------------------------------------------------------


@scaled
def test_the_control_arm_keeps_whatever_scaling_there_is(kind: str) -> None:
    control = extend_config(llama(kind), method="none", control=True, target_length=TARGET)
    assert control.max_position_embeddings == TARGET
    np.testing.assert_array_equal(frequencies(control), frequencies(llama(kind)))
    assert attention_factor(control) == attention_factor(llama(kind))


def test_a_map_hides_the_length_before_it_and_can_only_be_composed() -> None:
    carried = extend_config(llama(None), method="ntk-by-parts", target_length=REACH)
    for choice in ("refuse", "replace"):
        with pytest.raises(UnsupportedModelError, match=rf"no longer shows the length.*from the {REACH} positions"):
            extend_config(carried, method="linear", target_length=TARGET, on_existing=choice)  # type: ignore[arg-type]
    composed = extend_config(carried, method="linear", target_length=TARGET, on_existing="compose")
    np.testing.assert_allclose(frequencies(composed), frequencies(carried) / 4, rtol=3e-6)


def test_a_map_has_a_control_arm_too() -> None:
    carried = extend_config(llama(None), method="yarn", target_length=REACH, attention_factor=1.2)
    carried = extend_config(carried, method="ntk-by-parts", target_length=2 * REACH, on_existing="compose")
    control = extend_config(carried, method="none", control=True, target_length=TARGET, on_existing="compose")
    assert control.max_position_embeddings == TARGET
    np.testing.assert_array_equal(frequencies(control), frequencies(carried))
    assert attention_factor(control) == attention_factor(carried) == 1.2


def without(config: LlamaConfig, *keys: str) -> LlamaConfig:
    config.rope_parameters = {key: value for key, value in config.rope_parameters.items() if key not in keys}
    return config


FOLLOWS_THE_MAXIMUM = {
    "dynamic": lambda: extend_config(llama(None), method="dynamic", target_length=REACH),
    "longrope without a factor": lambda: without(llama("longrope"), "factor"),
}


@pytest.mark.parametrize("config", FOLLOWS_THE_MAXIMUM.values(), ids=FOLLOWS_THE_MAXIMUM.keys())
def test_a_scaling_that_follows_the_maximum_has_no_control_arm(config: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="max_position_embeddings"):
        extend_config(config(), method="none", control=True, target_length=TARGET)


def test_logits_of_a_composed_model_are_those_of_the_product() -> None:
    composed = extend_config(llama("linear"), method="linear", target_length=TARGET, on_existing="compose")
    at_once = extend_config(llama(None), method="linear", target_length=TARGET)
    ids = torch.arange(600).remainder(97)[None]
    with torch.inference_mode():
        torch.testing.assert_close(build(composed)(ids).logits, build(at_once)(ids).logits, rtol=0, atol=1e-4)
