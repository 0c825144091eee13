"""What every RoPE method works on and gives back; pure numbers, no torch.

A method turns the base model's RoPE into exactly two things, a table of inverse frequencies and an attention factor.
Symbols: theta_i = b^(-2i/d) with base b and rotary dimension d, original length L, target length L', factor s = L'/L.

Two ways to write a result into a Hugging Face config:
- the *stock* type of the method (`linear`, `yarn` ...), where one exists and is read right;
- a *map*: type `longrope` with short_factor = long_factor = base / new per dimension, which carries any frequencies at
  all. Its original length is set to its maximum and its factor to 1, because readers derive an attention factor of
  their own from their ratio; an attention factor other than 1 is written beside them, and folded into the query and
  key projections when the model is exported (`ctxext/rope/portable.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from ctxext.errors import UsageError

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

# A frequency of exactly 0 has no longrope factor (base / 0). This ratio to the base frequency stands for it: below
# 1e-12 radians a position, a dimension turns less than 1e-5 rad in ten million positions, so its cos is 1 in float32.
SMALLEST_RATIO = 1e-12


@dataclass(frozen=True)
class BaseRope:
    """What a (group of) layer(s) of the base model rotates by.

    Attributes:
        theta: base b of the frequencies.
        rotary_dim: how many dimensions d of a head are rotated; even.
        original_length: positions L that the base model was trained for.
        layer_type: key of the group in a nested `rope_parameters`, None when flat.
        kept: entries of the base's rope dict that every extended dict keeps (`partial_rotary_factor`).
        frequencies: radians per position where they are not b^(-2i/d): those of a model that is scaled already and
            is extended once more.
        attention_factor: what such a model multiplies cos and sin by already.
        proportional: the family's `proportional` type: only the fastest part of all frequencies is not zero (Gemma 4).
        own_temperature: the attention has a softmax temperature of its own for YaRN (multi-head latent attention,
            DeepSeek-V2, arXiv:2405.04434): it follows `mscale_all_dim`, and rotates only a part of each head, so an
            attention factor on cos and sin would be wrong there.
    """

    theta: float
    rotary_dim: int
    original_length: int
    layer_type: str | None = None
    kept: tuple[tuple[str, Any], ...] = ()
    frequencies: tuple[float, ...] | None = None
    attention_factor: float = 1.0
    own_temperature: bool = False
    proportional: bool = False

    def unscaled(self) -> Float64Array:
        """b^(-2i/d) in float64, shape [rotary_dim / 2], radians per position; slow ones are 0 when `proportional`."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        frequencies = np.asarray(self.theta ** (-exponents), dtype=np.float64)
        if self.proportional:
            frequencies[int(dict(self.kept).get("partial_rotary_factor", 1.0) * self.rotary_dim // 2) :] = 0.0
        return frequencies

    def inv_freq(self) -> Float64Array:
        """The base model's own inverse frequencies in float64, shape [rotary_dim / 2], radians per position."""
        return self.unscaled() if self.frequencies is None else np.asarray(self.frequencies, dtype=np.float64)

    def index_of_turns(self, turns: float) -> float:
        """The (fractional) index of the frequency that turns `turns` times within the original length.

        YaRN's i(r) = d ln(L / (2 pi r)) / (2 ln b) (arXiv:2309.00071, eq. 17, 18); for frequencies that are not a
        power series, read off their logarithms, with the power series' slope beyond both ends.
        """
        slope = 2 * math.log(self.theta) / self.rotary_dim  # how much ln(theta_i) falls from one index to the next
        if self.frequencies is None:
            return math.log(self.original_length / (turns * 2 * math.pi)) / slope
        falling = np.log(self.original_length * self.inv_freq() / (2 * math.pi))
        wanted = math.log(turns)
        if wanted >= falling[0]:
            return float((falling[0] - wanted) / slope)
        if wanted <= falling[-1]:
            return float(len(falling) - 1 + (falling[-1] - wanted) / slope)
        return float(np.interp(-wanted, -falling, np.arange(len(falling))))


@dataclass(frozen=True)
class RopeTable:
    """The two things that RoPE is made of.

    Attributes:
        inv_freq: radians per position, float32, shape [rotary_dim / 2].
        attention_factor: multiplies cos and sin.
        short_inv_freq: two-range methods only: what rotates while the sequence is no longer than the original length.
    """

    inv_freq: Float32Array
    attention_factor: float
    short_inv_freq: Float32Array | None = None


FirstOrLast = Literal["kept", "divided", "lowered"]


class RopeMethod(BaseModel, ABC):
    """A way of rewriting RoPE; parameters are validated fields, `factor` is derived when left out.

    To add a method of your own, derive from this class, give it a `method: Literal["name"] = "name"` field, and name
    it in your distribution's entry points under `ctxext.rope_methods`; `ctxext.rope.contract` holds the checks that
    it should pass.

    Class attributes:
        summary, when, source: one line each for `ctxext list methods`.
        read_by: who computes its stock form right.
        trainable: False when a model cannot be trained with it.
        monotone: frequencies fall with the index and are never raised.
        first, last: what becomes of the fastest and the slowest frequency: kept, divided by the factor, or lowered
            below the base's; None when the method promises nothing.
        identity_at_one: factor 1 gives the base's own frequencies and attention factor 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    summary: ClassVar[str]
    when: ClassVar[str]
    source: ClassVar[str]
    read_by: ClassVar[str] = "the portable form: transformers 4 and 5, vLLM, mlx-lm, llama.cpp"
    trainable: ClassVar[bool] = True
    monotone: ClassVar[bool] = True
    first: ClassVar[FirstOrLast | None] = None
    last: ClassVar[FirstOrLast | None] = None
    identity_at_one: ClassVar[bool] = True

    method: str
    factor: Annotated[float, Field(ge=1.0)] | None = None

    @abstractmethod
    def inv_freq(self, base: BaseRope) -> Float64Array:
        """Rewritten inverse frequencies, float64, shape [rotary_dim / 2]."""

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        """The complete dict of transformers' own type for this method, or None when it has none.

        Never relies on a default that upstream derives from other keys.
        """
        return None

    def attention_multiplier(self, base: BaseRope) -> float:
        """What multiplies cos and sin, on top of what the base model does; 1 unless the method says otherwise."""
        return 1.0

    def target_length(self, base: BaseRope) -> int:
        """Positions the extended model reaches."""
        return round(base.original_length * self.resolved_factor())

    def maximum_length(self, base: BaseRope) -> int:
        """What `max_position_embeddings` becomes."""
        return self.target_length(base)

    def table(self, base: BaseRope) -> RopeTable:
        """Frequencies and attention factor for `base`; needs a resolved factor."""
        attention_factor = self.attention_multiplier(base) * base.attention_factor
        return RopeTable(self.inv_freq(base).astype(np.float32), attention_factor)

    def rope_parameters(self, base: BaseRope, *, as_map: bool = False) -> dict[str, Any]:
        """The complete Hugging Face dict: the stock type, or the map where there is none or `as_map` asks for it.

        Raises:
            UsageError: this method cannot be written for this base.
        """
        stock = None if as_map or base.frequencies is not None else self.stock_parameters(base)
        return self.map_parameters(base) if stock is None else stock

    def map_parameters(self, base: BaseRope) -> dict[str, Any]:
        """The dict of type `longrope` that carries this method's frequencies and attention factor.

        Raises:
            UsageError: an attention factor that this family's attention cannot take on cos and sin.
        """
        attention_factor = self._refuse_beside_own_temperature(base)
        unscaled = base.unscaled()
        ratios = np.maximum(self.inv_freq(base) / unscaled, SMALLEST_RATIO)
        factors = [float(factor) for factor in 1.0 / ratios]
        parameters = {
            **self._common(base, "longrope"),
            "factor": 1.0,
            "original_max_position_embeddings": self.target_length(base),
            "short_factor": factors,
            "long_factor": list(factors),
        }
        if attention_factor != 1.0:
            parameters["attention_factor"] = attention_factor
        return parameters

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

    def resolved_factor(self) -> float:
        """The factor s; `resolved` (or the caller) has set it."""
        assert self.factor is not None, "resolved() comes first"
        return self.factor

    def _refuse_beside_own_temperature(self, base: BaseRope) -> float:
        """The attention factor in all; refused where the family's attention cannot take one on cos and sin."""
        attention_factor = self.attention_multiplier(base) * base.attention_factor
        if base.own_temperature and attention_factor != 1.0:
            raise UsageError(
                "this model's attention has a temperature of its own and takes no attention factor in a frequency map",
                where="rope.method",
                got=f"{self.method} with attention factor {attention_factor:g}",
                expected="yarn in its stock form, or a method without an attention factor",
            )
        return attention_factor

    def _common(self, base: BaseRope, rope_type: str) -> dict[str, Any]:
        return {"rope_type": rope_type, "rope_theta": base.theta, **dict(base.kept)}
