"""Methods that name every frequency: LongRoPE, CoPE, Resonance, your own map; dynamic scaling; YaRN beside latent
attention. Each against transformers itself or a few independent lines."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_families import build, run, tiny_family_config
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ctxext import extend_config
from ctxext.errors import PositionsNotInEffectError, UsageError
from ctxext.rope.base import SMALLEST_RATIO, BaseRope
from ctxext.rope.methods import (
    Cope,
    Dynamic,
    FrequencyMap,
    LongRope,
    Ntk,
    NtkByParts,
    Resonance,
    Yarn,
    create_method,
    method_from_rope_parameters,
)
from ctxext.rope.verify import verify_positions

ORIGINAL, TARGET = 128, 512
HALF = 8
BASE = BaseRope(1e4, 2 * HALF, ORIGINAL)
SHORT = [1.0, 1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
LONG = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 3.8, 4.0]


def llama(**changes: Any) -> LlamaConfig:
    parameters = {"rope_type": "default", "rope_theta": 1e4}
    return LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": ORIGINAL,
            "initializer_range": 0.2,
            "rope_parameters": parameters,
            **changes,
        }
    )


def theirs(config: LlamaConfig, length: int) -> tuple[Any, float]:
    """Frequencies and attention factor of transformers' rotary module once it has seen `length` positions."""
    module: Any = LlamaRotaryEmbedding(copy.deepcopy(config))
    module(torch.zeros(1, 1, 1), torch.arange(length)[None])
    return module.inv_freq.numpy().astype(np.float64), module.attention_scaling


# ---- LongRoPE ------------------------------------------------------------------------------------------------------


def test_one_range_divides_every_frequency_by_its_factor_at_every_length() -> None:
    config = extend_config(llama(), method="longrope", target_length=TARGET, long_factor=LONG)
    for length in (2, ORIGINAL, ORIGINAL + 1, TARGET):
        frequencies, attention_factor = theirs(config, length)
        np.testing.assert_allclose(frequencies * LONG, BASE.inv_freq(), rtol=3e-6)
        assert attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(ORIGINAL)))


def test_two_ranges_change_at_the_original_length() -> None:
    config = extend_config(llama(), method="longrope", target_length=TARGET, long_factor=LONG, short_factor=SHORT)
    assert config.rope_parameters["original_max_position_embeddings"] == ORIGINAL
    table = LongRope(long_factor=LONG, short_factor=SHORT, factor=4.0).table(BASE)
    assert table.short_inv_freq is not None
    np.testing.assert_allclose(theirs(config, ORIGINAL)[0], table.short_inv_freq, rtol=3e-6)
    np.testing.assert_allclose(theirs(config, ORIGINAL + 1)[0], table.inv_freq, rtol=3e-6)
    np.testing.assert_allclose(table.short_inv_freq * SHORT, BASE.inv_freq(), rtol=1e-6)
    np.testing.assert_allclose(table.inv_freq * LONG, BASE.inv_freq(), rtol=1e-6)
    assert theirs(config, TARGET)[1] == pytest.approx(table.attention_factor)


def test_two_ranges_are_verified_on_both_sides() -> None:
    config = extend_config(llama(), method="longrope", target_length=TARGET, long_factor=LONG, short_factor=SHORT)
    verify_positions(build(config), config)
    for name in ("long_factor", "short_factor"):
        wrong = copy.deepcopy(config)
        wrong.rope_parameters[name] = [1.01 * factor for factor in wrong.rope_parameters[name]]
        with pytest.raises(PositionsNotInEffectError):
            verify_positions(build(wrong), config)


def test_equal_ranges_are_one_range() -> None:
    one = extend_config(llama(), method="longrope", target_length=TARGET, long_factor=LONG)
    both = extend_config(llama(), method="longrope", target_length=TARGET, long_factor=LONG, short_factor=LONG)
    assert one.rope_parameters == both.rope_parameters


def test_the_attention_factor_follows_the_lengths_unless_it_is_given() -> None:
    assert LongRope(long_factor=LONG, factor=4.0).table(BASE).attention_factor == pytest.approx(1.1338934190276817)
    assert LongRope(long_factor=LONG, factor=4.0, attention_factor=1.0).table(BASE).attention_factor == 1.0
    config = extend_config(llama(), method="longrope", target_length=TARGET, long_factor=LONG, attention_factor=1.3)
    assert theirs(config, TARGET)[1] == 1.3


def test_a_map_never_leaves_the_attention_factor_to_the_reader() -> None:
    # Without a factor of 1, readers derive one of their own from the ratio of maximum and original length.
    config = extend_config(llama(), method="longrope", target_length=TARGET, long_factor=LONG, attention_factor=1.0)
    parameters = config.rope_parameters
    assert (parameters["factor"], parameters["original_max_position_embeddings"]) == (1.0, TARGET)
    assert "attention_factor" not in parameters
    assert theirs(config, TARGET)[1] == 1.0


def test_factors_of_the_wrong_length_are_refused_with_both_counts() -> None:
    for factors in ({"long_factor": LONG[:-1]}, {"long_factor": LONG[:-1], "short_factor": SHORT[:-1]}):
        with pytest.raises(UsageError, match=r"rope\.long_factor.*7 entries.*expected 8 \(half of 16 rotary dim"):
            extend_config(llama(), method="longrope", target_length=TARGET, **factors)
    with pytest.raises(UsageError, match="short_factor has 7 entries and long_factor 8"):
        extend_config(llama(), method="longrope", target_length=TARGET, long_factor=LONG, short_factor=SHORT[:-1])


def test_a_two_range_form_cannot_be_a_map() -> None:
    method = LongRope(long_factor=LONG, short_factor=SHORT, factor=4.0)
    with pytest.raises(UsageError, match="two-range"):
        method.rope_parameters(BASE, as_map=True)


# ---- files ---------------------------------------------------------------------------------------------------------


def written(folder: Path, kind: str) -> Path:
    factors: dict[str, Any] = {"long_factor": LONG, "short_factor": [1, 1, *SHORT[2:]]}  # whole numbers happen
    if kind == "yaml":
        (folder / "factors.yaml").write_text(yaml.safe_dump(factors))
        return folder / "factors.yaml"
    if kind == "config":
        extended = extend_config(
            llama(), method="longrope", target_length=TARGET, long_factor=LONG, short_factor=SHORT, attention_factor=1.2
        )
        extended.save_pretrained(folder)
        return folder / "config.json"
    if kind == "old config":
        older = {"model_type": "phi3", "rope_scaling": {"type": "longrope", **factors}}
        (folder / "config.json").write_text(json.dumps(older))
        return folder / "config.json"
    if kind == "multimodal config":
        (folder / "config.json").write_text(json.dumps({"text_config": {"rope_parameters": factors}}))
        return folder / "config.json"
    (folder / "factors.json").write_text(json.dumps(factors))
    return folder / "factors.json"


@pytest.mark.parametrize("kind", ["json", "yaml", "config", "old config", "multimodal config"])
def test_factors_are_read_from_a_file(kind: str, tmp_path: Path) -> None:
    method = create_method("longrope", file=str(written(tmp_path, kind)))
    assert isinstance(method, LongRope)
    assert method.long_factor == LONG
    assert method.short_factor == SHORT
    assert method.attention_factor == (1.2 if kind == "config" else None)
    # The stored recipe needs no second file.
    assert "file" not in method.model_dump()
    assert LongRope.model_validate(method.model_dump()) == method


def test_a_frequency_map_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    file.write_text(yaml.safe_dump({"ratios": [1.0] * 4 + [0.5] * 4, "attention_factor": 1.1}))
    method = create_method("frequency-map", file=str(file))
    assert isinstance(method, FrequencyMap)
    assert method.ratios == [1.0] * 4 + [0.5] * 4
    assert method.attention_factor == 1.1


BAD_FILES: dict[str, tuple[str, str, str]] = {
    "missing": ("gone.json", "", "cannot be read"),
    "broken JSON": ("f.json", '{"long_factor": [1', "cannot be read"),
    "broken YAML": ("f.yaml", "long_factor: [1", "cannot be read"),
    "binary": ("f.yaml", "\0\1", "cannot be read"),
    "a list": ("f.json", "[1.0, 2.0]", "holds no mapping, but list"),
    "nothing of use": ("f.json", '{"factors": [1.0]}', "holds none of long_factor, short_factor"),
    "short factors alone": ("f.json", '{"short_factor": [1.0]}', "Field required"),
    "text for a number": ("f.json", '{"long_factor": ["a"]}', "valid number"),
    "true for a number": ("f.json", '{"long_factor": [true]}', "valid number"),
    "a negative factor": ("f.json", '{"long_factor": [-1.0]}', "greater than 0"),
    "not a number": ("f.json", '{"long_factor": [NaN]}', "finite number|greater than 0"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_one_clear_error(name: str, content: str, message: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        create_method("longrope", file=str(tmp_path / name))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "huge.json"
    with file.open("wb") as handle:
        handle.truncate(10_000_001)
    with pytest.raises(UsageError, match="larger than any frequency map"):
        create_method("longrope", file=str(file))


def test_both_a_file_and_a_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give file or long_factor, not both"):
        create_method("longrope", file=str(written(tmp_path, "json")), long_factor=LONG)


# ---- CoPE ----------------------------------------------------------------------------------------------------------


def cope_by_hand(base: BaseRope, count: int) -> Any:
    frequencies = [base.theta ** (-2 * index / base.rotary_dim) for index in range(base.rotary_dim // 2)]
    for step in range(count):
        frequencies[len(frequencies) - count + step] *= (1 + math.cos(math.pi * step / (count - 1))) / 2
    return np.asarray(frequencies)


@pytest.mark.parametrize(("base", "count"), [(BaseRope(1e4, 128, 4096), 20), (BaseRope(5e5, 64, 8192), 32), (BASE, 2)])
def test_cope_tapers_the_slowest_frequencies_along_a_cosine(base: BaseRope, count: int) -> None:
    ours, expected = Cope(dimensions=count, factor=4.0).inv_freq(base), cope_by_hand(base, count)
    np.testing.assert_allclose(ours[:-1], expected[:-1], rtol=1e-12)
    assert expected[-1] < 1e-17
    assert ours[-1] == base.unscaled()[-1] * SMALLEST_RATIO


def test_cope_has_twenty_dimensions_by_default_and_no_more_than_the_model() -> None:
    assert Cope().dimensions == 20
    with pytest.raises(UsageError, match=r"rope\.dimensions.*got 20; expected at most 8"):
        extend_config(llama(), method="cope", target_length=TARGET)


def test_the_smallest_ratio_stands_for_a_frequency_of_zero_up_to_a_million_positions() -> None:
    config = extend_config(llama(), method="cope", dimensions=5, target_length=1 << 20)
    model: Any = build(config)
    verify_positions(model, config)
    exact: Any = copy.deepcopy(model)
    exact.model.rotary_emb.inv_freq[-1] = 0.0
    unscaled = build(extend_config(llama(), method="none", control=True, target_length=1 << 20))
    for offset in (0, ORIGINAL, 65_536, (1 << 20) - 12):
        torch.testing.assert_close(run(model, offset=offset), run(exact, offset=offset), rtol=0, atol=1e-6)
    # A prompt that spans the whole range, in which the slowest dimensions matter most.
    ids, positions = torch.arange(12)[None] + 20, torch.tensor([[*range(6), *range((1 << 20) - 6, 1 << 20)]])
    with torch.inference_mode():
        near, zero, other = (
            part(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
            for part in (model, exact, unscaled)
        )
    torch.testing.assert_close(near, zero, rtol=0, atol=1e-6)
    assert (near - other).abs().max() > 1e-2


# ---- Resonance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["none", "linear", "ntk", "yarn"])
def test_resonance_rounds_wavelengths_to_whole_positions(after: str) -> None:
    base = BaseRope(1e4, 64, 2048)
    scaled = base.inv_freq() if after == "none" else create_method(after, factor=4.0).inv_freq(base)
    expected = [2 * math.pi / max(1, round(2 * math.pi / frequency)) for frequency in scaled]
    method = create_method("resonance", after=after, factor=4.0)
    np.testing.assert_allclose(method.inv_freq(base), expected, rtol=1e-12)
    wavelengths = 2 * np.pi / method.inv_freq(base)
    np.testing.assert_allclose(wavelengths, np.rint(wavelengths), rtol=1e-9)
    assert np.abs(wavelengths - 2 * np.pi / scaled).max() <= 0.5 + 1e-9
    factor = Yarn(factor=4.0).default_attention_factor() if after == "yarn" else 1.0
    assert method.table(base).attention_factor == factor


def test_resonance_repeats_angles_of_fast_dimensions() -> None:
    base = BaseRope(1e4, 64, 2048)
    fastest = Resonance(after="none", factor=4.0).inv_freq(base)[0]
    assert 2 * math.pi / fastest == pytest.approx(6)
    np.testing.assert_allclose(np.cos(fastest * (np.arange(6) + 6000)), np.cos(fastest * np.arange(6)), atol=1e-9)


# ---- a map of one's own --------------------------------------------------------------------------------------------


def test_a_frequency_map_is_what_rotates() -> None:
    frequencies = [1.0, 0.7, 0.3, 0.1, 0.05, 0.01, 0.002, 0.0005]
    config = extend_config(
        llama(), method="frequency-map", frequencies=frequencies, attention_factor=1.15, target_length=TARGET
    )
    seen, attention_factor = theirs(config, TARGET)
    np.testing.assert_allclose(seen, frequencies, rtol=1e-6)
    assert attention_factor == 1.15
    verify_positions(build(config), config)


def test_ratios_are_to_the_models_own_frequencies() -> None:
    ratios = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    table = FrequencyMap(ratios=ratios, factor=4.0).table(BASE)
    np.testing.assert_allclose(table.inv_freq / BASE.inv_freq(), ratios, rtol=1e-6)


@pytest.mark.parametrize("name", ["frequencies", "ratios"])
def test_a_map_of_the_wrong_length_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"rope\.{name}.*3 entries.*expected 8"):
        extend_config(llama(), method="frequency-map", target_length=TARGET, **{name: [1.0, 0.5, 0.1]})


def test_a_map_comes_back_as_longrope_with_the_same_table() -> None:
    method = FrequencyMap(ratios=[1 / factor for factor in LONG], attention_factor=1.2, factor=4.0)
    parameters = method.rope_parameters(BASE)
    again = method_from_rope_parameters(parameters)
    assert isinstance(again, LongRope)
    reached = BaseRope(1e4, 2 * HALF, TARGET)
    np.testing.assert_allclose(again.table(reached).inv_freq, method.table(BASE).inv_freq, rtol=1e-7)
    assert again.table(reached).attention_factor == 1.2


def test_ntk_by_parts_is_yarn_with_an_attention_factor_of_one() -> None:
    yarn = Yarn(factor=4.0).table(BASE)
    parts = NtkByParts(factor=4.0).table(BASE)
    np.testing.assert_array_equal(parts.inv_freq, yarn.inv_freq)
    assert parts.attention_factor == 1.0
    assert NtkByParts(factor=4.0).rope_parameters(BASE)["rope_type"] == "longrope"


# ---- dynamic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", [1.0, 2.0])
@pytest.mark.parametrize("target", [129, 192, 256, 512, 1000])
def test_dynamic_equals_transformers_at_the_length_of_the_sequence(growth: float, target: int) -> None:
    config = extend_config(llama(), method="dynamic", growth=growth, target_length=target)
    table = Dynamic(growth=growth).resolved(ORIGINAL, target).table(BASE)
    np.testing.assert_allclose(theirs(config, target)[0], table.inv_freq, rtol=3e-6)
    for short in (2, ORIGINAL):
        np.testing.assert_allclose(theirs(config, short)[0], BASE.inv_freq(), rtol=3e-6)
    assert table.short_inv_freq is not None
    np.testing.assert_allclose(table.short_inv_freq, BASE.inv_freq(), rtol=1e-6)


def test_dynamic_at_growth_one_is_ntk_of_the_sequence() -> None:
    np.testing.assert_allclose(Dynamic(factor=4.0).inv_freq(BASE), Ntk(factor=4.0).inv_freq(BASE), rtol=1e-12)


def test_dynamic_keeps_the_maximum_at_the_original_length() -> None:
    config = extend_config(llama(), method="dynamic", target_length=TARGET)
    assert config.max_position_embeddings == ORIGINAL
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0}
    verify_positions(build(config), config)


def test_a_dynamic_model_that_does_not_grow_is_noticed() -> None:
    config = extend_config(llama(), method="dynamic", target_length=TARGET)
    with pytest.raises(PositionsNotInEffectError):
        verify_positions(build(llama()), config)
    raised = copy.deepcopy(config)
    raised.max_position_embeddings = TARGET
    with pytest.raises(PositionsNotInEffectError):
        verify_positions(build(raised), config)


def test_dynamic_is_not_for_training_and_has_no_map() -> None:
    assert not Dynamic.trainable
    with pytest.raises(UsageError, match="dynamic scaling has no fixed frequencies"):
        Dynamic(factor=2.0).rope_parameters(BASE, as_map=True)


# ---- YaRN beside latent attention ----------------------------------------------------------------------------------

OWN = BaseRope(1e4, 16, ORIGINAL, own_temperature=True)


def test_yarn_leaves_the_temperature_to_latent_attention() -> None:
    method = Yarn(factor=4.0)
    assert method.table(OWN).attention_factor == 1.0
    parameters = method.rope_parameters(OWN)
    assert (parameters["mscale"], parameters["mscale_all_dim"]) == (1.0, 1.0)
    assert "attention_factor" not in parameters
    assert "mscale" not in method.rope_parameters(BASE)


def test_an_attention_factor_beside_latent_attention_is_refused() -> None:
    config = tiny_family_config("deepseek_v3")
    for settings in (
        {"method": "yarn", "attention_factor": 1.2},
        {"method": "frequency-map", "ratios": [0.5] * 8, "attention_factor": 1.2},
        {"method": "longrope", "long_factor": LONG, "attention_factor": 1.2},
        {"method": "longrope", "long_factor": LONG, "short_factor": SHORT, "attention_factor": 1.2},
    ):
        with pytest.raises(UsageError, match="temperature"):
            extend_config(config, target_length=TARGET, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("short_factor", [None, SHORT])
def test_longrope_beside_latent_attention_has_no_attention_factor(short_factor: list[float] | None) -> None:
    config = extend_config(
        tiny_family_config("deepseek_v3"),
        method="longrope",
        target_length=TARGET,
        long_factor=LONG,
        short_factor=short_factor,
    )
    assert verify_positions(build(config), config).attention_factor == 1.0
