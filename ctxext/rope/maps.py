"""RoPE methods that say what becomes of every single frequency: LongRoPE's factors, CoPE, Resonance, your own map.

No stock reader has a type for most of them; they travel as a map (`RopeMethod.map_parameters`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import yaml
from pydantic import Field, model_validator

from ctxext.errors import UsageError
from ctxext.rope.base import SMALLEST_RATIO, BaseRope, Float64Array, RopeMethod, RopeTable
from ctxext.rope.formulas import Linear, Ntk, Yarn

PositiveFloats = list[Annotated[float, Field(gt=0)]]
_LARGEST_FILE_BYTES = 10_000_000


def _read_map_file(path: str) -> dict[str, Any]:
    """A JSON or YAML mapping; a whole config.json is accepted for the RoPE dict that it holds.

    Raises:
        ValueError: unreadable, or no mapping.
    """
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > _LARGEST_FILE_BYTES:
            raise ValueError(f"{path} is larger than any frequency map ({_LARGEST_FILE_BYTES} bytes)")
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    for nested in ("text_config", "rope_parameters", "rope_scaling"):
        if isinstance(content, dict) and isinstance(content.get(nested), dict):
            content = content[nested]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping, but {type(content).__name__}")
    return content


def _with_file(values: Any, accepted: tuple[str, ...]) -> Any:
    """`values` with `file` replaced by what the file says, so that a stored recipe needs no second file."""
    if not isinstance(values, dict) or values.get("file") is None:
        return values
    given = [name for name in accepted if values.get(name) is not None]
    if given:
        raise ValueError(f"give file or {given[0]}, not both")
    content = _read_map_file(str(values["file"]))
    found = {name: content[name] for name in accepted if content.get(name) is not None}
    if not found:
        raise ValueError(f"{values['file']} holds none of {', '.join(accepted)}")
    return {**{key: value for key, value in values.items() if key != "file"}, **_as_floats(found)}


def _as_floats(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [float(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value]
        if isinstance(value, list)
        else value
        for name, value in found.items()
    }


def _check_count(name: str, values: list[float], base: BaseRope) -> None:
    if len(values) != base.rotary_dim // 2:
        raise UsageError(
            f"rope.{name} must have one entry for each of the model's frequencies",
            where=f"rope.{name}",
            got=f"{len(values)} entries",
            expected=f"{base.rotary_dim // 2} (half of {base.rotary_dim} rotary dimensions)",
        )


class LongRope(RopeMethod):
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753, eq. 3): every frequency divided by a factor of its own.

    With `short_factor` too, sequences up to the original length use that one instead (two ranges; keys in a KV cache
    that was filled below the border then keep the other range's angles). cos and sin are multiplied by
    sqrt(1 + ln s / ln L) unless `attention_factor` says otherwise.
    """

    summary = "every frequency divided by its own factor, as searched or published for the model"
    when = "with factors that were searched for this model (`file` reads them from JSON, YAML or a config.json)"
    source = "arXiv:2402.13753"
    read_by = "one range: the portable form; two ranges: transformers and vLLM (vLLM with its own attention factor)"
    monotone = False
    identity_at_one = False

    method: Literal["longrope"] = "longrope"
    long_factor: PositiveFloats
    short_factor: PositiveFloats | None = None
    attention_factor: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, values: Any) -> Any:
        return _with_file(values, ("long_factor", "short_factor", "attention_factor"))

    @model_validator(mode="after")
    def _one_range_when_equal(self) -> Self:
        if self.short_factor is not None and len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                f"short_factor has {len(self.short_factor)} entries and long_factor {len(self.long_factor)}"
            )
        return self

    @property
    def has_two_ranges(self) -> bool:
        """Whether short sequences rotate by other frequencies than long ones."""
        return self.short_factor is not None and self.short_factor != self.long_factor

    def attention_multiplier(self, base: BaseRope) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if base.own_temperature:
            return 1.0
        return math.sqrt(1.0 + math.log(self.resolved_factor()) / math.log(base.original_length))

    def inv_freq(self, base: BaseRope) -> Float64Array:
        _check_count("long_factor", self.long_factor, base)
        return np.asarray(base.inv_freq() / np.asarray(self.long_factor))

    def table(self, base: BaseRope) -> RopeTable:
        table = super().table(base)
        if not self.has_two_ranges:
            return table
        assert self.short_factor is not None
        _check_count("short_factor", self.short_factor, base)
        short = (base.inv_freq() / np.asarray(self.short_factor)).astype(np.float32)
        return RopeTable(table.inv_freq, table.attention_factor, short)

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        if not self.has_two_ranges:
            return None  # a map says the same, and every reader computes it right
        assert self.short_factor is not None
        _check_count("long_factor", self.long_factor, base)
        _check_count("short_factor", self.short_factor, base)
        parameters = {
            **self._common(base, "longrope"),
            "factor": self.resolved_factor(),
            "original_max_position_embeddings": base.original_length,
            "short_factor": list(self.short_factor),
            "long_factor": list(self.long_factor),
        }
        self._refuse_beside_own_temperature(base)
        if self.attention_factor is not None or base.own_temperature:
            parameters["attention_factor"] = self.attention_multiplier(base)
        return parameters

    def map_parameters(self, base: BaseRope) -> dict[str, Any]:
        if self.has_two_ranges:
            raise UsageError(
                "two-range LongRoPE cannot be carried by one map: short sequences rotate by other frequencies",
                where="rope.short_factor",
                hint="Leave rope.short_factor out for one range.",
            )
        return super().map_parameters(base)


class FrequencyMap(RopeMethod):
    """Any frequencies at all: `frequencies` in radians per position, or `ratios` to the base model's own."""

    summary = "your own frequency for every dimension, from the recipe or a file"
    when = "to try an idea, or to reproduce a model whose frequencies you know"
    source = "-"
    monotone = False
    identity_at_one = False

    method: Literal["frequency-map"] = "frequency-map"
    frequencies: PositiveFloats | None = None
    ratios: PositiveFloats | None = None
    attention_factor: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, values: Any) -> Any:
        return _with_file(values, ("frequencies", "ratios", "attention_factor"))

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.frequencies is None) == (self.ratios is None):
            raise ValueError("give frequencies (radians per position), ratios (new / base), or a file with one of them")
        return self

    def attention_multiplier(self, base: BaseRope) -> float:
        return self.attention_factor

    def inv_freq(self, base: BaseRope) -> Float64Array:
        if self.frequencies is not None:
            _check_count("frequencies", self.frequencies, base)
            return np.asarray(self.frequencies, dtype=np.float64)
        assert self.ratios is not None
        _check_count("ratios", self.ratios, base)
        return np.asarray(base.inv_freq() * np.asarray(self.ratios))


class Cope(RopeMethod):
    """CoPE, clipped RoPE (2026, arXiv:2602.05258): the slowest n frequencies times (1 + cos(linspace(0, pi, n))) / 2.

    The slowest becomes 0, a dimension that no longer rotates; `SMALLEST_RATIO` stands for 0 wherever a factor is
    written. The factor s plays no part.
    """

    summary = "the slowest frequencies fade out along a cosine, the slowest to zero; the rest is kept"
    when = "before training at the longer length; keeps short range, needs training for retrieval"
    source = "arXiv:2602.05258"
    first = "kept"
    last = "lowered"
    identity_at_one = False

    method: Literal["cope"] = "cope"
    dimensions: Annotated[int, Field(ge=2)] = 20

    def inv_freq(self, base: BaseRope) -> Float64Array:
        half = base.rotary_dim // 2
        if self.dimensions > half:
            raise UsageError(
                "rope.dimensions exceeds the number of the model's frequencies",
                where="rope.dimensions",
                got=self.dimensions,
                expected=f"at most {half}",
            )
        taper = np.ones(half)
        taper[half - self.dimensions :] = (1.0 + np.cos(np.linspace(0.0, np.pi, self.dimensions))) / 2.0
        return np.asarray(np.maximum(base.inv_freq() * taper, base.unscaled() * SMALLEST_RATIO))


class Resonance(RopeMethod):
    """Resonance RoPE (Wang et al. 2024, arXiv:2403.00071, sec. 4): wavelengths rounded to whole positions.

    lambda_i = 2 pi / theta_i becomes its nearest integer, after another method (`after`) has scaled the frequencies, so
    that fast dimensions repeat angles they have seen in training. Wavelengths too long to matter change by less than
    half a position.
    """

    summary = "wavelengths rounded to whole positions, after YaRN (or linear, ntk, none)"
    when = "on top of YaRN, before training; helps fast dimensions to meet only angles they know"
    source = "arXiv:2403.00071"
    identity_at_one = False
    monotone = False

    method: Literal["resonance"] = "resonance"
    after: Literal["yarn", "linear", "ntk", "none"] = "yarn"

    def _scaling(self) -> RopeMethod | None:
        methods = {"yarn": Yarn, "linear": Linear, "ntk": Ntk}
        return methods[self.after](factor=self.factor) if self.after in methods else None

    def attention_multiplier(self, base: BaseRope) -> float:
        scaling = self._scaling()
        return 1.0 if scaling is None else scaling.attention_multiplier(base)

    def inv_freq(self, base: BaseRope) -> Float64Array:
        scaling = self._scaling()
        scaled = base.inv_freq() if scaling is None else scaling.inv_freq(base)
        return np.asarray(2 * np.pi / np.maximum(np.rint(2 * np.pi / scaled), 1.0))
