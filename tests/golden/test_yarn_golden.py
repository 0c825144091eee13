"""YaRN and position interpolation give the numbers of their authors, and variants known to be wrong do not.

The YaRN facts were computed with the authors' own code: github.com/jquesnelle/yarn at commit
a18e54988639030e706f6ff9db224cf74e08a65a, `scaled_rope/LlamaYaRNScaledRotaryEmbedding.py`, `yarn()`, float32 buffers
summed in float64. The facts of position interpolation are arithmetic (arXiv:2306.15595, eq. 4).

Every mutant below is a mistake that some published re-implementation has made or that a slip of the pen would make. A
mutant that passes means that the facts are too weak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from ctxext.rope.methods import BaseRope, Linear, RopeTable, Yarn

Frequencies = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GoldenYarn:
    """One row: the base model, and what YaRN must make of it. `ratios` is new / base at an index."""

    theta: float
    rotary_dim: int
    factor: float
    original_length: int
    bounds: tuple[int, int]
    ratios: dict[int, float]
    frequency_sum: float
    attention_factor: float

    @property
    def base(self) -> BaseRope:
        return BaseRope(self.theta, self.rotary_dim, self.original_length)


FACTOR_8 = 1.2079441541679836
GOLDEN = {
    "llama-2 to 32K": GoldenYarn(
        1e4, 128, 8.0, 4096, (20, 46), {0: 1.0, 20: 1.0, 33: 0.5625, 46: 0.125, 63: 0.125}, 7.37154939570064, FACTOR_8
    ),
    "ramp beyond the last frequency": GoldenYarn(
        1e4, 128, 4.0, 65536, (40, 65), {0: 1.0, 40: 1.0, 51: 0.67, 63: 0.31}, 7.4560631955791905, 1.138629436111989
    ),
    "llama-3 to 64K": GoldenYarn(
        5e5,
        128,
        8.0,
        8192,
        (18, 35),
        {0: 1.0, 18: 1.0, 26: 0.588235, 35: 0.125, 63: 0.125},
        5.364729517791915,
        FACTOR_8,
    ),
    "heads of 64": GoldenYarn(
        1e4, 64, 8.0, 2048, (8, 21), {0: 1.0, 8: 1.0, 14: 0.596154, 21: 0.125, 31: 0.125}, 3.919481991622888, FACTOR_8
    ),
}

# Float32 rounding adds up to 1.2e-7 at most; the nearest wrong variant that changes frequencies is 1.9e-5 away.
SUM_TOLERANCE = 1e-6
RATIO_TOLERANCE = 2e-6


def broken_facts(table: RopeTable, golden: GoldenYarn) -> list[str]:
    """Names of the golden facts that `table` contradicts."""
    inv_freq = table.inv_freq.astype(np.float64)
    broken = []
    if abs(inv_freq.sum() - golden.frequency_sum) > SUM_TOLERANCE:
        broken.append(f"sum of frequencies {inv_freq.sum():.9f}, not {golden.frequency_sum:.9f}")
    ratios = inv_freq / golden.base.inv_freq()
    broken += [
        f"ratio[{index}] {ratios[index]:.7f}, not {expected:.7f}"
        for index, expected in golden.ratios.items()
        if abs(ratios[index] - expected) > RATIO_TOLERANCE
    ]
    if abs(table.attention_factor - golden.attention_factor) > 1e-12:
        broken.append(f"attention factor {table.attention_factor:.9f}, not {golden.attention_factor:.9f}")
    return broken


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN.keys())
def test_yarn_equals_the_authors_numbers(golden: GoldenYarn) -> None:
    method = Yarn(factor=golden.factor)
    assert method.ramp_bounds(golden.base) == golden.bounds
    assert broken_facts(method.table(golden.base), golden) == []


@dataclass(frozen=True)
class Variant:
    """YaRN with every decision open, so that each can be taken wrongly on its own."""

    inverted_ramp: bool = False
    scale_frequencies: Callable[[Frequencies, float], Frequencies] = lambda frequencies, s: frequencies / s
    attention: Callable[[float], float] = lambda s: 0.1 * math.log(s) + 1.0
    largest_bound: Callable[[int], int] = lambda d: d - 1
    ramp_indices: Callable[[int], Frequencies] = lambda d: np.arange(d // 2, dtype=np.float64)
    length_of_turns: Callable[[float, float], float] = lambda original, s: original
    rounded: bool = True
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    blend_wavelengths: bool = False

    def table(self, golden: GoldenYarn) -> RopeTable:
        d, s = golden.rotary_dim, golden.factor
        length = self.length_of_turns(golden.original_length, s)

        def dimension_of(turns: float) -> float:
            return d * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(golden.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.rounded:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.largest_bound(d))
        ramp = np.clip((self.ramp_indices(d) - low) / (high - low), 0.0, 1.0)
        if self.inverted_ramp:
            ramp = 1.0 - ramp
        unscaled = golden.base.inv_freq()
        scaled = self.scale_frequencies(unscaled, s)
        if self.blend_wavelengths:
            inv_freq = 1.0 / (ramp / scaled + (1.0 - ramp) / unscaled)
        else:
            inv_freq = scaled * ramp + unscaled * (1.0 - ramp)
        return RopeTable(inv_freq.astype(np.float32), self.attention(s))


MUTANTS = {
    "inverted ramp": Variant(inverted_ramp=True),
    "scaled twice": Variant(scale_frequencies=lambda frequencies, s: frequencies / s / s),
    "square root of the attention factor": Variant(attention=lambda s: math.sqrt(0.1 * math.log(s) + 1.0)),
    "attention factor squared": Variant(attention=lambda s: (0.1 * math.log(s) + 1.0) ** 2),
    "attention factor inverted": Variant(attention=lambda s: 1.0 / (0.1 * math.log(s) + 1.0)),
    "attention factor left out": Variant(attention=lambda s: 1.0),
    "decimal logarithm in the attention factor": Variant(attention=lambda s: 0.1 * math.log10(s) + 1.0),
    "factor squared": Variant(
        scale_frequencies=lambda frequencies, s: frequencies / s**2, attention=lambda s: 0.1 * math.log(s**2) + 1.0
    ),
    "clamped at d/2 - 1": Variant(largest_bound=lambda d: d // 2 - 1),
    "ramp over d": Variant(ramp_indices=lambda d: np.arange(0, d, 2, dtype=np.float64)),
    "target length for the original": Variant(length_of_turns=lambda original, s: original * s),
    "bounds not rounded": Variant(rounded=False),
    "betas swapped": Variant(beta_fast=1.0, beta_slow=32.0),
    "wavelengths blended instead of frequencies": Variant(blend_wavelengths=True),
}


def test_the_unchanged_variant_is_yarn() -> None:
    for golden in GOLDEN.values():
        assert broken_facts(Variant().table(golden), golden) == []


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_wrong_variants_contradict_the_facts(mutant: Variant) -> None:
    broken = {name: broken_facts(mutant.table(golden), golden) for name, golden in GOLDEN.items()}
    assert any(broken.values())


def test_only_a_ramp_beyond_the_last_frequency_shows_the_wrong_clamp() -> None:
    mutant = MUTANTS["clamped at d/2 - 1"]
    caught_by = [name for name, golden in GOLDEN.items() if broken_facts(mutant.table(golden), golden)]
    assert caught_by == ["ramp beyond the last frequency"]


@pytest.mark.parametrize("factor", [2.0, 8.0, 32.0])
def test_position_interpolation_divides_every_frequency(factor: float) -> None:
    base = BaseRope(1e4, 128, 4096)
    table = Linear(factor=factor).table(base)
    # Sum of a geometric series; with b = 1e4 and d = 128 the unscaled frequencies sum to 7.459954.
    ratio = 1e4 ** (-2 / 128)
    assert abs(table.inv_freq.sum(dtype=np.float64) - (1 - ratio**64) / (1 - ratio) / factor) < SUM_TOLERANCE
    assert table.inv_freq[0] == 1.0 / factor
    assert table.attention_factor == 1.0


def test_position_interpolation_feeds_a_fraction_of_the_position() -> None:
    # Llama 2 at s = 8: position 32768 turns as position 4096 did; the slowest frequency is 1e4^(-126/128) / 8.
    base = BaseRope(1e4, 128, 4096)
    inv_freq = Linear(factor=8.0).inv_freq(base)
    np.testing.assert_allclose(32768 * inv_freq, 4096 * base.inv_freq(), rtol=1e-15)
    assert inv_freq[63] == pytest.approx(1.1547819846894581e-4 / 8, rel=1e-12)
