"""Methods that only change theta (ntk, theta), and llama3: equal to transformers, right at both ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ctxext import extend_config
from ctxext.errors import UsageError
from ctxext.rope.families import base_ropes
from ctxext.rope.methods import AdjustedTheta, BaseRope, Llama3, Ntk, create_method

thetas = st.floats(1e3, 1e7)
head_dims = st.sampled_from([16, 64, 80, 128, 256])
factors = st.sampled_from([1.5, 2.0, 4.0, 8.0, 32.0])


def llama(theta: float, head_dim: int, length: int = 4096) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )


@given(thetas, head_dims, factors)
def test_ntk_keeps_the_fastest_frequency_and_divides_the_slowest_by_the_factor(
    theta: float, head_dim: int, factor: float
) -> None:
    base = BaseRope(theta, head_dim, 4096)
    ratios = Ntk(factor=factor).inv_freq(base) / base.inv_freq()
    assert ratios[0] == pytest.approx(1.0, rel=1e-12)
    assert ratios[-1] == pytest.approx(1 / factor, rel=1e-9)
    assert np.all(np.diff(ratios) < 0)


def test_prolong_theta_is_about_twice_the_ntk_value() -> None:
    # Gao et al. 2024 (arXiv:2410.02660) raised Llama 3's theta from 5e5 to 8e6 for eight times the length.
    base = BaseRope(5e5, 128, 8192)
    assert Ntk(factor=8.0).new_theta(base) == pytest.approx(4.134e6, rel=1e-3)
    assert AdjustedTheta(factor=8.0).new_theta(base) == pytest.approx(8e6, rel=0.05)


@given(thetas, head_dims, factors, st.sampled_from(["ntk", "theta", "llama3"]))
def test_frequencies_equal_those_transformers_computes_from_the_exported_config(
    theta: float, head_dim: int, factor: float, name: str
) -> None:
    config = llama(theta, head_dim)
    extended = extend_config(config, method=name, target_length=round(4096 * factor))
    method = create_method(name).resolved(4096, round(4096 * factor))
    parameters = extended.rope_parameters
    if parameters["rope_type"] == "default":
        steps = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        upstream = 1.0 / parameters["rope_theta"] ** steps
    else:
        upstream, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](extended)
    ours = method.table(base_ropes(config)[0])
    np.testing.assert_allclose(upstream.numpy(), ours.inv_freq, rtol=3e-6)
    assert ours.attention_factor == 1.0


def test_llama3_keeps_short_wavelengths_and_divides_long_ones() -> None:
    base = BaseRope(5e5, 128, 8192)
    ratios = Llama3(factor=8.0).inv_freq(base) / base.inv_freq()
    wavelengths = 2 * math.pi / base.inv_freq()
    assert np.all(ratios[wavelengths < 8192 / 4] == 1.0)
    np.testing.assert_allclose(ratios[wavelengths > 8192], 1 / 8, rtol=1e-12)
    assert np.all(np.diff(ratios) <= 1e-12)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("theta", {"theta": 1e6, "multiple": 3.0}, "theta or multiple"),
        ("theta", {"theta": 1e4}, "expected above 500000"),
        ("theta", {"multiple": 0.5}, "multiple"),
        ("llama3", {"low_freq_factor": 4.0}, "must be greater"),
    ],
)
def test_parameters_that_do_not_extend_are_refused(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        extend_config(llama(5e5, 128, 8192), method=name, target_length=65536, **parameters)
