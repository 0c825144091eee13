"""Every method computes what transformers computes from the dict that it writes, and refuses bad parameters by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ctxext.errors import UsageError
from ctxext.rope.methods import (
    METHODS,
    BaseRope,
    Linear,
    NoRewrite,
    RopeMethod,
    Yarn,
    create_method,
    method_from_rope_parameters,
)
from ctxext.rope.verify import RELATIVE_TOLERANCE

bases = st.builds(
    BaseRope,
    theta=st.floats(1e3, 1e7),
    rotary_dim=st.integers(8, 128).map(lambda half: 2 * half),
    original_length=st.integers(64, 1 << 18),
)
factors = st.floats(1.0, 64.0)
linears = st.builds(Linear, factor=factors)
yarns = st.builds(
    Yarn,
    factor=factors,
    beta_fast=st.floats(9.0, 64.0),
    beta_slow=st.floats(0.5, 8.0),
    attention_factor=st.none() | st.floats(0.5, 2.0),
    truncate=st.booleans(),
)


def transformers_table(base: BaseRope, parameters: dict[str, Any]) -> tuple[np.ndarray[Any, Any], float]:
    config = LlamaConfig(
        hidden_size=2 * base.rotary_dim,
        num_attention_heads=2,
        head_dim=base.rotary_dim,
        max_position_embeddings=base.original_length * 64,
        rope_parameters=parameters,
    )
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    return inv_freq.numpy().astype(np.float64), float(attention_factor)


@settings(max_examples=300)
@given(base=bases, method=linears | yarns)
def test_tables_equal_those_of_transformers(base: BaseRope, method: RopeMethod) -> None:
    theirs, their_factor = transformers_table(base, method.rope_parameters(base))
    ours = method.table(base)
    assert ours.inv_freq.dtype == np.float32
    np.testing.assert_allclose(ours.inv_freq, theirs, rtol=RELATIVE_TOLERANCE, atol=0)
    assert math.isclose(ours.attention_factor, their_factor, rel_tol=1e-9)


@settings(max_examples=300)
@given(base=bases, method=linears | yarns)
def test_the_written_dict_leads_back_to_the_method(base: BaseRope, method: RopeMethod) -> None:
    parameters = method.rope_parameters(base)
    again = method_from_rope_parameters(parameters)
    assert again.rope_parameters(base) == parameters
    np.testing.assert_array_equal(again.table(base).inv_freq, method.table(base).inv_freq)
    assert math.isclose(again.table(base).attention_factor, method.table(base).attention_factor, rel_tol=1e-9)


@given(base=bases, method=linears | yarns)
def test_the_written_dict_is_complete_and_plain(base: BaseRope, method: RopeMethod) -> None:
    parameters = method.rope_parameters(base)
    assert parameters["rope_theta"] == base.theta
    assert parameters["factor"] == method.factor
    if isinstance(method, Yarn):
        assert parameters["original_max_position_embeddings"] == base.original_length
        assert {"beta_fast", "beta_slow"} <= set(parameters)
    assert all(type(value) in (str, int, float, bool) for value in parameters.values())


@given(base=bases)
def test_factor_one_changes_nothing(base: BaseRope) -> None:
    unscaled = base.inv_freq().astype(np.float32)
    np.testing.assert_array_equal(Linear(factor=1.0).table(base).inv_freq, unscaled)
    np.testing.assert_allclose(Yarn(factor=1.0).table(base).inv_freq, unscaled, rtol=1e-6)
    assert Yarn(factor=1.0).table(base).attention_factor == 1.0


@given(base=bases, method=linears | yarns)
def test_frequencies_fall_and_lie_between_unscaled_and_interpolated(base: BaseRope, method: RopeMethod) -> None:
    unscaled, rewritten = base.inv_freq(), method.inv_freq(base)
    assert method.factor is not None
    assert (np.diff(rewritten) < 0).all()
    assert (rewritten <= unscaled * (1 + 1e-12)).all()
    assert (rewritten >= unscaled / method.factor * (1 - 1e-12)).all()


def test_no_rewrite_keeps_every_frequency() -> None:
    base = BaseRope(1e4, 64, 128)
    method = create_method("none", control=True).resolved(128, 512)
    np.testing.assert_array_equal(method.inv_freq(base), base.inv_freq())
    assert method.rope_parameters(base) == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize("factor", [2.0, 4.0, 8.0, 7.3])
def test_the_default_attention_factor_is_not_written(factor: float) -> None:
    base = BaseRope(1e4, 64, 128)
    default = Yarn(factor=factor).default_attention_factor()
    assert "attention_factor" not in Yarn(factor=factor).rope_parameters(base)
    assert "attention_factor" not in Yarn(factor=factor, attention_factor=default).rope_parameters(base)
    assert Yarn(factor=factor, attention_factor=1.0).rope_parameters(base)["attention_factor"] == 1.0


BAD_PARAMETERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "factor below one": ("yarn", {"factor": 0.5}, "factor"),
    "factor zero": ("linear", {"factor": 0.0}, "factor"),
    "factor not a number": ("linear", {"factor": math.nan}, "factor"),
    "factor infinite": ("yarn", {"factor": math.inf}, "factor"),
    "factor as text": ("yarn", {"factor": "8"}, "factor"),
    "misspelt beta": ("yarn", {"beta_fsat": 32.0}, "beta_fsat"),
    "betas out of order": ("yarn", {"beta_fast": 1.0, "beta_slow": 32.0}, "beta_fast"),
    "betas equal": ("yarn", {"beta_fast": 4.0, "beta_slow": 4.0}, "beta_slow"),
    "beta negative": ("yarn", {"beta_slow": -1.0}, "beta_slow"),
    "beta infinite": ("yarn", {"beta_fast": math.inf}, "beta_fast"),
    "attention factor zero": ("yarn", {"attention_factor": 0.0}, "attention_factor"),
    "truncate as number": ("yarn", {"truncate": 1}, "truncate"),
    "parameter of another method": ("linear", {"beta_fast": 32.0}, "beta_fast"),
    "none without control": ("none", {}, "control"),
    "none with control off": ("none", {"control": False}, "control"),
    "longrope without factors": ("longrope", {}, "long_factor"),
    "longrope with a negative factor": ("longrope", {"long_factor": [1.0, -1.0]}, "long_factor"),
    "frequency map without a map": ("frequency-map", {}, "frequencies"),
    "frequency map with two maps": ("frequency-map", {"frequencies": [1.0], "ratios": [1.0]}, "ratios"),
    "cope of one dimension": ("cope", {"dimensions": 1}, "dimensions"),
    "resonance after nothing known": ("resonance", {"after": "dynamic"}, "after"),
    "dynamic that shrinks": ("dynamic", {"growth": 0.5}, "growth"),
    "ntk-by-parts with an attention factor": ("ntk-by-parts", {"attention_factor": 1.2}, "attention_factor"),
}


@pytest.mark.parametrize(("method", "parameters", "named"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS.keys())
def test_bad_parameters_are_refused_by_name(method: str, parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        create_method(method, **parameters)
    assert named in str(caught.value).partition("expected")[0]


def test_unknown_methods_get_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'yarn'") as caught:
        create_method("yran")
    assert all(name in str(caught.value) for name in METHODS)


@pytest.mark.parametrize("truncate", [True, False])
def test_a_ramp_without_any_dimension_is_refused(truncate: bool) -> None:
    # 128 positions hold 20.4 turns of the fastest dimension; with 30 asked, nothing at all would be interpolated.
    base = BaseRope(1e4, 64, 128)
    with pytest.raises(UsageError, match=r"rope\.beta_slow"):
        Yarn(factor=4.0, beta_fast=100.0, beta_slow=30.0, truncate=truncate).inv_freq(base)


def test_a_ramp_of_one_step_interpolates_all_but_the_fastest_dimension() -> None:
    base = BaseRope(1e4, 64, 128)
    method = Yarn(factor=4.0, beta_fast=100.0, beta_slow=21.0)
    assert method.ramp_bounds(base) == (0, 0)
    ratios = method.inv_freq(base) / base.inv_freq()
    np.testing.assert_allclose(ratios, [1.0, *[0.25] * 31], rtol=1e-12)


NEEDED: dict[str, dict[str, Any]] = {
    "none": {"control": True},
    "longrope": {"long_factor": [2.0] * 4},
    "frequency-map": {"ratios": [0.5] * 4},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_resolved_method_knows_its_factor(name: str) -> None:
    method = create_method(name, **NEEDED.get(name, {}))
    assert method.factor is None
    assert method.resolved(8192, 16384).factor == 2.0
    assert method.resolved(1000, 1500).factor == 1.5


@pytest.mark.parametrize("target", [128, 127, 1])
def test_a_target_not_above_the_original_length_is_refused(target: int) -> None:
    with pytest.raises(UsageError, match="target_length"):
        Yarn().resolved(128, target)


def test_a_factor_that_contradicts_the_lengths_is_refused() -> None:
    with pytest.raises(UsageError, match=r"rope\.factor.*contradicts"):
        Yarn(factor=4.0).resolved(128, 256)
    assert Yarn(factor=2.0).resolved(128, 256).factor == 2.0


def test_unscaled_and_unknown_rope_types_on_the_way_back() -> None:
    assert isinstance(method_from_rope_parameters({"rope_theta": 1e4}), NoRewrite)
    with pytest.raises(UsageError, match="rope_type"):
        method_from_rope_parameters({"rope_type": "spiral", "rope_theta": 1e4})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_does(name: str) -> None:
    method = METHODS[name]
    assert method.summary
    assert method.when
    assert method.source
    assert method.model_fields["method"].default == name
