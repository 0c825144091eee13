"""RoPE methods that are formulas of the factor, most with a type of their own in transformers; pure numbers.

Surprises: YaRN's ramp runs over [0, d/2) but is clamped at d - 1, not at d/2 - 1 (it matters as soon as the slow end
of the ramp lies beyond the last frequency); YaRN's attention factor multiplies cos *and* sin, so attention logits
change by its square.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ctxext.errors import UsageError
from ctxext.rope.base import BaseRope, FirstOrLast, Float64Array, RopeMethod, RopeTable

_READ_BY_ALL = "transformers 4 and 5, vLLM, SGLang, mlx-lm, llama.cpp"


def with_other_theta(base: BaseRope, theta: float) -> Float64Array:
    """The base's frequencies as if its base b were `theta`: theta_i times (b' / b)^(-2i/d)."""
    exponents = np.arange(0, base.rotary_dim, 2, dtype=np.float64) / base.rotary_dim
    return np.asarray(base.inv_freq() * (theta / base.theta) ** (-exponents))


class Linear(RopeMethod):
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595, eq. 4): every frequency divided by s.

    Equal to feeding position m / s. Squeezes the fast dimensions too, so short range suffers until trained.
    """

    summary = "position interpolation: every frequency divided by the factor"
    when = "simple and read by every program; needs training before it is any good"
    source = "arXiv:2306.15595"
    read_by = _READ_BY_ALL
    first = "divided"
    last = "divided"

    method: Literal["linear"] = "linear"

    def inv_freq(self, base: BaseRope) -> Float64Array:
        return base.inv_freq() / self.resolved_factor()

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return {
            **self._common(base, "proportional" if base.proportional else "linear"),
            "factor": self.resolved_factor(),
        }


class Yarn(RopeMethod):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate only where the wavelength does not fit.

    - A dimension that turns r times within L: i(r) = d ln(L / (2 pi r)) / (2 ln b)   (eq. 17, 18).
    - Above `beta_fast` turns it keeps its frequency, below `beta_slow` it is divided by s, between them lies a linear
      ramp (eq. 20).
    - cos and sin are multiplied by 0.1 ln s + 1 (eq. 22, sqrt(1/t)).
    """

    summary = "frequencies that turn often are kept, slow ones interpolated, ramp between; attention sharpened"
    when = "the default: works before training and trains fastest"
    source = "arXiv:2309.00071"
    read_by = _READ_BY_ALL
    first = "kept"
    last = "divided"

    method: Literal["yarn"] = "yarn"
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _betas_in_order(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast:g}) must be greater than beta_slow ({self.beta_slow:g})")
        return self

    def default_attention_factor(self) -> float:
        """0.1 ln s + 1, what every reader derives by itself."""
        return 0.1 * math.log(self.resolved_factor()) + 1.0

    def attention_multiplier(self, base: BaseRope) -> float:
        if base.own_temperature:
            if self.attention_factor is not None:
                raise UsageError(
                    "this model's attention sets its own temperature for YaRN, which an attention factor contradicts",
                    where="rope.attention_factor",
                    got=self.attention_factor,
                    hint="Leave rope.attention_factor out.",
                )
            return 1.0
        return self.default_attention_factor() if self.attention_factor is None else self.attention_factor

    def ramp_bounds(self, base: BaseRope) -> tuple[float, float]:
        """First interpolated and first fully interpolated index, clamped to [0, d - 1].

        Raises:
            UsageError: no dimension turns as often as `beta_slow` asks, so that nothing would be interpolated.
        """

        low, high = base.index_of_turns(self.beta_fast), base.index_of_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, base.rotary_dim - 1)
        if high < low:
            # Upstream's ramp then runs backwards and scales no frequency at all, without a word.
            raise UsageError(
                "YaRN's ramp holds no dimension, so no frequency would be interpolated",
                where="rope.beta_slow",
                got=self.beta_slow,
                expected=f"fewer turns than the original length of {base.original_length} positions holds",
            )
        return low, high

    def inv_freq(self, base: BaseRope) -> Float64Array:
        low, high = self.ramp_bounds(base)
        if low == high:
            high += 0.001  # a step instead of a ramp, as in the original code
        index = np.arange(base.rotary_dim // 2, dtype=np.float64)
        interpolated = np.clip((index - low) / (high - low), 0.0, 1.0)
        before = base.inv_freq()
        return np.asarray(before / self.resolved_factor() * interpolated + before * (1.0 - interpolated))

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        self.attention_multiplier(base)  # refuses what the family's own temperature contradicts
        parameters: dict[str, Any] = {
            **self._common(base, "yarn"),
            "factor": self.resolved_factor(),
            "original_max_position_embeddings": base.original_length,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }
        # Readers drop, square or invert an explicit attention factor (vLLM, mlx-lm, llama.cpp have each done so):
        # it is written only when it says something that they would not derive by themselves.
        if self.attention_factor is not None and not math.isclose(
            self.attention_factor, self.default_attention_factor(), rel_tol=1e-9
        ):
            parameters["attention_factor"] = self.attention_factor
        if base.own_temperature:
            # Both at 1: cos and sin keep their size, and the softmax scale grows by (0.1 ln s + 1)^2, as YaRN asks.
            parameters |= {"mscale": 1.0, "mscale_all_dim": 1.0} | parameters
        if not self.truncate:
            parameters["truncate"] = False
            if base.layer_type is not None:
                return None  # transformers 5.23 reads `truncate` from the outer dict only, so a nested one is ignored
        return parameters


class NtkByParts(Yarn):
    """NTK-by-parts (bloc97 2023; Peng et al. 2023, arXiv:2309.00071, sec. 3.2): YaRN without its attention factor."""

    summary = "YaRN's frequencies without its attention factor"
    when = "where cos and sin must keep their size; YaRN usually does better"
    source = "arXiv:2309.00071, sec. 3.2"
    # A stock `yarn` with an explicit attention factor of 1 would say the same, but readers drop or square it.
    read_by = RopeMethod.read_by

    method: Literal["ntk-by-parts"] = "ntk-by-parts"  # type: ignore[assignment]
    attention_factor: None = None

    def attention_multiplier(self, base: BaseRope) -> float:
        return 1.0

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return None


class Ntk(RopeMethod):
    """NTK-aware scaling (bloc97, 2023; Peng et al. 2023, arXiv:2309.00071, eq. 14): the base grows instead.

    b' = b s^(d / (d - 2)): the fastest dimension keeps its frequency, the slowest is divided by exactly s.
    """

    summary = "the base theta grows so that the slowest frequency is divided by the factor, the fastest kept"
    when = "works untrained at small factors; every program reads it, because only theta changes"
    source = "arXiv:2309.00071"
    read_by = _READ_BY_ALL
    first = "kept"
    last: ClassVar[FirstOrLast | None] = "divided"

    method: Literal["ntk"] = "ntk"

    def new_theta(self, base: BaseRope) -> float:
        """b' = b s^(d / (d - 2))."""
        if base.rotary_dim < 4:
            raise UsageError(
                "NTK-aware scaling needs at least 4 rotary dimensions", where="rope.method", got=base.rotary_dim
            )
        return float(base.theta * self.resolved_factor() ** (base.rotary_dim / (base.rotary_dim - 2)))

    def inv_freq(self, base: BaseRope) -> Float64Array:
        return with_other_theta(base, self.new_theta(base))

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return {**self._common(base, "default"), "rope_theta": self.new_theta(base)}


class AdjustedTheta(Ntk):
    """Adjusted base frequency (Xiong et al. 2023, arXiv:2309.16039): a larger theta, trained.

    Either `theta` itself, or `multiple` times the NTK-aware value; practitioners use 2 to 4 times.
    """

    summary = "a larger base theta, given or as a multiple of the NTK-aware value"
    when = "for long training at the new length (Llama 3, ProLong); weak untrained"
    source = "arXiv:2309.16039"
    last: ClassVar[FirstOrLast | None] = "lowered"
    identity_at_one = False

    method: Literal["theta"] = "theta"  # type: ignore[assignment]
    theta: Annotated[float, Field(gt=1)] | None = None
    multiple: Annotated[float, Field(ge=1)] = 2.0

    @model_validator(mode="after")
    def _theta_or_multiple(self) -> Self:
        # Compared with the default, not asked whether it was given: a stored recipe has every default written out.
        if self.theta is not None and self.multiple != type(self).model_fields["multiple"].default:
            raise ValueError("give theta or multiple, not both")
        return self

    def new_theta(self, base: BaseRope) -> float:
        """The given theta, which must be above the base's, or the multiple of the NTK-aware value."""
        if self.theta is None:
            return self.multiple * super().new_theta(base)
        if self.theta <= base.theta:
            raise UsageError(
                "rope.theta does not extend the model",
                where="rope.theta",
                got=self.theta,
                expected=f"above {base.theta:g}",
            )
        return self.theta


class Dynamic(Ntk):
    """Dynamic NTK (emozilla 2023; Peng et al. 2023, arXiv:2309.00071, sec. 3.3): the base grows with each sequence.

    For a sequence of n > L tokens b' = b (f n / L - (f - 1))^(d / (d - 2)), with `growth` f; up to L nothing changes.
    """

    summary = "NTK-aware scaling that follows the length of each sequence; nothing changes up to the original length"
    when = "inference without any training; not with a KV cache beyond the original length, where keys keep old angles"
    source = "arXiv:2309.00071, sec. 3.3"
    read_by = "transformers; vLLM and mlx-lm compute a fixed or another form"
    trainable = False
    last: ClassVar[FirstOrLast | None] = "lowered"  # by f s - (f - 1), which is the factor s when f is 1

    method: Literal["dynamic"] = "dynamic"  # type: ignore[assignment]
    growth: Annotated[float, Field(ge=1)] = 1.0

    def new_theta(self, base: BaseRope) -> float:
        """The base at the target length; shorter sequences get a smaller one."""
        grown = self.model_copy(update={"factor": self.growth * self.resolved_factor() - (self.growth - 1.0)})
        return super(Dynamic, grown).new_theta(base)

    def maximum_length(self, base: BaseRope) -> int:
        # transformers reads `max_position_embeddings` as the original length: raising it would switch scaling off.
        return base.original_length

    def table(self, base: BaseRope) -> RopeTable:
        """As seen by a sequence of the target length; a sequence within the original length sees the base's own."""
        return replace(super().table(base), short_inv_freq=base.inv_freq().astype(np.float32))

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return {**self._common(base, "dynamic"), "factor": self.growth}

    def map_parameters(self, base: BaseRope) -> dict[str, Any]:
        raise UsageError(
            "dynamic scaling has no fixed frequencies that another form could carry",
            where="rope.method",
            got="dynamic",
            expected="ntk, its static form",
        )


class Llama3(RopeMethod):
    """Llama 3.1's scaling (Dubey et al. 2024, arXiv:2407.21783; `apply_scaling` of Meta's llama-models).

    By wavelength: below L / high_freq_factor a frequency is kept, above L / low_freq_factor divided by s, in between
    interpolated linearly in L / wavelength.
    """

    summary = "kept, interpolated or divided by the factor, by wavelength against the original length"
    when = "to match Llama 3.1 checkpoints; close to YaRN without its attention factor"
    source = "arXiv:2407.21783"
    read_by = _READ_BY_ALL
    first = "kept"
    last = "divided"

    method: Literal["llama3"] = "llama3"
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0

    @model_validator(mode="after")
    def _factors_in_order(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor:g}) must be greater than "
                f"low_freq_factor ({self.low_freq_factor:g})"
            )
        return self

    def inv_freq(self, base: BaseRope) -> Float64Array:
        before = base.inv_freq()
        turns = base.original_length * before / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return np.asarray(before * (kept + (1.0 - kept) / self.resolved_factor()))

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return {
            **self._common(base, "llama3"),
            "factor": self.resolved_factor(),
            "original_max_position_embeddings": base.original_length,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
        }


class NoRewrite(RopeMethod):
    """The control arm of an experiment: only the allowed length changes, every frequency stays."""

    summary = "no rewrite: only the allowed length changes (the control arm of an experiment)"
    when = "to learn what the same training does without extension; asks for control: true"
    source = "-"
    read_by = _READ_BY_ALL
    first = "kept"
    last = "kept"

    method: Literal["none"] = "none"
    control: Literal[True]

    def inv_freq(self, base: BaseRope) -> Float64Array:
        return base.inv_freq()

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return self._common(base, "default")
