"""RoPE methods: one small class each; pure numbers, no torch.

A method turns the base model's RoPE into exactly two things, a table of inverse frequencies and an attention
factor, and knows how to write itself as a Hugging Face `rope_parameters` dict. Symbols: theta_i = b^(-2i/d) with
base b and rotary dimension d, original length L, target length L', factor s = L'/L.

Surprises: YaRN's ramp runs over [0, d/2) but is clamped at d - 1, not at d/2 - 1 (it matters as soon as the slow end
of the ramp lies beyond the last frequency); YaRN's attention factor multiplies cos *and* sin, so attention logits
change by its square.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ctxext.errors import UsageError, unknown_name

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BaseRope:
    """What a (group of) layer(s) of the base model rotates by.

    Attributes:
        theta: base b of the frequencies.
        rotary_dim: how many dimensions d of a head are rotated; even.
        original_length: positions L that the base model was trained for.
        layer_type: key of the group in a nested `rope_parameters`, None when flat.
        kept: entries of the base's rope dict that every extended dict keeps (`partial_rotary_factor`).
    """

    theta: float
    rotary_dim: int
    original_length: int
    layer_type: str | None = None
    kept: tuple[tuple[str, float], ...] = ()

    def inv_freq(self) -> npt.NDArray[np.float64]:
        """Unscaled inverse frequencies theta_i in float64, shape [rotary_dim / 2], radians per position."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        return np.asarray(self.theta ** (-exponents), dtype=np.float64)


@dataclass(frozen=True)
class RopeTable:
    """The two things that RoPE is made of.

    Attributes:
        inv_freq: radians per position, float32, shape [rotary_dim / 2].
        attention_factor: multiplies cos and sin.
    """

    inv_freq: Float32Array
    attention_factor: float


class RopeMethod(BaseModel, ABC):
    """A way of rewriting RoPE; parameters are validated fields, `factor` is derived when left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    summary: ClassVar[str]
    when: ClassVar[str]
    source: ClassVar[str]

    method: str
    factor: Annotated[float, Field(ge=1.0)] | None = None

    @abstractmethod
    def inv_freq(self, base: BaseRope) -> npt.NDArray[np.float64]:
        """Rewritten inverse frequencies, float64, shape [rotary_dim / 2]."""

    @abstractmethod
    def rope_parameters(self, base: BaseRope) -> dict[str, Any]:
        """The complete Hugging Face dict; never relies on a default that upstream derives from other keys."""

    def attention_multiplier(self) -> float:
        """What multiplies cos and sin; 1 unless the method says otherwise."""
        return 1.0

    def table(self, base: BaseRope) -> RopeTable:
        """Frequencies and attention factor for `base`; needs a resolved factor."""
        return RopeTable(self.inv_freq(base).astype(np.float32), self.attention_multiplier())

    def resolved(self, original_length: int, target_length: int) -> Self:
        """This method with its factor derived, or the given factor checked against the lengths.

        Raises:
            UsageError: target not above original, or factor and lengths disagree.
        """
        if target_length <= original_length:
            raise UsageError(
                "target_length must be above the model's original length",
                where="target_length",
                got=target_length,
                expected=f"more than {original_length}",
                hint="The model reaches that length without being extended.",
            )
        implied = target_length / original_length
        if self.factor is not None and not math.isclose(self.factor, implied, rel_tol=1e-6):
            raise UsageError(
                "rope.factor contradicts target_length",
                where="rope.factor",
                got=self.factor,
                expected=f"{implied:g} (target_length {target_length} / original length {original_length})",
                hint="Leave rope.factor out; it is derived.",
            )
        return self.model_copy(update={"factor": implied})

    def _factor(self) -> float:
        assert self.factor is not None, "resolved() comes first"
        return self.factor

    def _common(self, base: BaseRope, rope_type: str) -> dict[str, Any]:
        return {"rope_type": rope_type, "rope_theta": base.theta, **dict(base.kept)}


class Linear(RopeMethod):
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595, eq. 4): every frequency divided by s.

    Equal to feeding position m / s. Squeezes the fast dimensions too, so short range suffers until trained.
    """

    summary = "position interpolation: every frequency divided by the factor"
    when = "simple and read by every program; needs training before it is any good"
    source = "arXiv:2306.15595"

    method: Literal["linear"] = "linear"

    def inv_freq(self, base: BaseRope) -> npt.NDArray[np.float64]:
        return base.inv_freq() / self._factor()

    def rope_parameters(self, base: BaseRope) -> dict[str, Any]:
        return {**self._common(base, "linear"), "factor": self._factor()}


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
        return 0.1 * math.log(self._factor()) + 1.0

    def attention_multiplier(self) -> float:
        return self.default_attention_factor() if self.attention_factor is None else self.attention_factor

    def ramp_bounds(self, base: BaseRope) -> tuple[float, float]:
        """First interpolated and first fully interpolated index, clamped to [0, d - 1].

        Raises:
            UsageError: no dimension turns as often as `beta_slow` asks, so that nothing would be interpolated.
        """

        def dimension_of(turns: float) -> float:
            scale = math.log(base.original_length / (turns * 2 * math.pi))
            return base.rotary_dim * scale / (2 * math.log(base.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
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

    def inv_freq(self, base: BaseRope) -> npt.NDArray[np.float64]:
        low, high = self.ramp_bounds(base)
        if low == high:
            high += 0.001  # a step instead of a ramp, as in the original code
        index = np.arange(base.rotary_dim // 2, dtype=np.float64)
        interpolated = np.clip((index - low) / (high - low), 0.0, 1.0)
        unscaled = base.inv_freq()
        return np.asarray(unscaled / self._factor() * interpolated + unscaled * (1.0 - interpolated))

    def rope_parameters(self, base: BaseRope) -> dict[str, Any]:
        parameters = {
            **self._common(base, "yarn"),
            "factor": self._factor(),
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
        if not self.truncate:
            parameters["truncate"] = False
        return parameters


class Ntk(RopeMethod):
    """NTK-aware scaling (bloc97, 2023; Peng et al. 2023, arXiv:2309.00071, eq. 14): the base grows instead.

    b' = b s^(d / (d - 2)): the fastest dimension keeps its frequency, the slowest is divided by exactly s.
    """

    summary = "the base theta grows so that the slowest frequency is divided by the factor, the fastest kept"
    when = "works untrained at small factors; every program reads it, because only theta changes"
    source = "arXiv:2309.00071"

    method: Literal["ntk"] = "ntk"

    def new_theta(self, base: BaseRope) -> float:
        """b' = b s^(d / (d - 2))."""
        if base.rotary_dim < 4:
            raise UsageError(
                "NTK-aware scaling needs at least 4 rotary dimensions", where="rope.method", got=base.rotary_dim
            )
        return float(base.theta * self._factor() ** (base.rotary_dim / (base.rotary_dim - 2)))

    def inv_freq(self, base: BaseRope) -> npt.NDArray[np.float64]:
        return replace(base, theta=self.new_theta(base)).inv_freq()

    def rope_parameters(self, base: BaseRope) -> dict[str, Any]:
        return {**self._common(base, "default"), "rope_theta": self.new_theta(base)}


class AdjustedTheta(Ntk):
    """Adjusted base frequency (Xiong et al. 2023, arXiv:2309.16039): a larger theta, trained.

    Either `theta` itself, or `multiple` times the NTK-aware value; practitioners use 2 to 4 times.
    """

    summary = "a larger base theta, given or as a multiple of the NTK-aware value"
    when = "for long training at the new length (Llama 3, ProLong); weak untrained"
    source = "arXiv:2309.16039"

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


class Llama3(RopeMethod):
    """Llama 3.1's scaling (Dubey et al. 2024, arXiv:2407.21783; `apply_scaling` of Meta's llama-models).

    By wavelength: below L / high_freq_factor a frequency is kept, above L / low_freq_factor divided by s, in between
    interpolated linearly in L / wavelength.
    """

    summary = "kept, interpolated or divided by the factor, by wavelength against the original length"
    when = "to match Llama 3.1 checkpoints; close to YaRN without its attention factor"
    source = "arXiv:2407.21783"

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

    def inv_freq(self, base: BaseRope) -> npt.NDArray[np.float64]:
        unscaled = base.inv_freq()
        turns = base.original_length * unscaled / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return np.asarray(unscaled * (kept + (1.0 - kept) / self._factor()))

    def rope_parameters(self, base: BaseRope) -> dict[str, Any]:
        return {
            **self._common(base, "llama3"),
            "factor": self._factor(),
            "original_max_position_embeddings": base.original_length,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
        }


class NoRewrite(RopeMethod):
    """The control arm of an experiment: only the allowed length changes, every frequency stays."""

    summary = "no rewrite: only the allowed length changes (the control arm of an experiment)"
    when = "to learn what the same training does without extension; asks for control: true"
    source = "-"

    method: Literal["none"] = "none"
    control: Literal[True]

    def inv_freq(self, base: BaseRope) -> npt.NDArray[np.float64]:
        return base.inv_freq()

    def rope_parameters(self, base: BaseRope) -> dict[str, Any]:
        return self._common(base, "default")


AnyRopeMethod = Annotated[Linear | Ntk | AdjustedTheta | Yarn | Llama3 | NoRewrite, Field(discriminator="method")]

METHODS: dict[str, type[RopeMethod]] = {
    "linear": Linear,
    "ntk": Ntk,
    "theta": AdjustedTheta,
    "yarn": Yarn,
    "llama3": Llama3,
    "none": NoRewrite,
}


# Rope types that `method_from_rope_parameters` understands; `ntk` and `theta` are `default` with another theta.
READABLE_TYPES = ("default", "linear", "yarn", "llama3")


def create_method(name: str, **parameters: Any) -> RopeMethod:
    """The method `name` with validated parameters.

    Raises:
        UsageError: unknown method, unknown parameter or bad value.
    """
    from pydantic import ValidationError

    if name not in METHODS:
        raise unknown_name("RoPE method", name, METHODS, where="method")
    try:
        return METHODS[name](method=name, **parameters)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        accepted = ", ".join(sorted(set(METHODS[name].model_fields) - {"method"}))
        raise UsageError(
            f"bad parameter for method '{name}': {first['msg'].removeprefix('Value error, ')}",
            where=key or name,
            got=first.get("input") if key else None,
            expected=f"parameters of {name}: {accepted}",
        ) from error


def method_from_rope_parameters(parameters: dict[str, Any]) -> RopeMethod:
    """The method that a Hugging Face dict written by `rope_parameters` describes (the way back).

    Raises:
        UsageError: a rope type that ctxext has no method for.
    """
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        return NoRewrite(control=True)
    if rope_type == "linear":
        return Linear(factor=float(parameters["factor"]))
    if rope_type == "yarn":
        given = parameters.get("attention_factor")
        return Yarn(
            factor=float(parameters["factor"]),
            beta_fast=float(parameters.get("beta_fast") or 32.0),
            beta_slow=float(parameters.get("beta_slow") or 1.0),
            attention_factor=None if given is None else float(given),
            truncate=bool(parameters.get("truncate", True)),
        )
    if rope_type == "llama3":
        return Llama3(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
        )
    raise unknown_name("rope_type", str(rope_type), READABLE_TYPES)
