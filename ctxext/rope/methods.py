"""The RoPE methods by name: ours, and those that other distributions add through entry points.

A distribution adds a method by naming a `RopeMethod` class in its entry points under the group `ctxext.rope_methods`;
recipes, `ctxext list methods`, patchers and verification then treat it like any other.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, ValidationError

from ctxext.errors import UsageError, unknown_name
from ctxext.rope.base import BaseRope, RopeMethod, RopeTable
from ctxext.rope.formulas import AdjustedTheta, Dynamic, Linear, Llama3, NoRewrite, Ntk, NtkByParts, Yarn
from ctxext.rope.maps import Cope, FrequencyMap, LongRope, Resonance

__all__ = [
    "METHODS",
    "READABLE_TYPES",
    "AdjustedTheta",
    "AnyRopeMethod",
    "BaseRope",
    "Cope",
    "Dynamic",
    "FrequencyMap",
    "Linear",
    "Llama3",
    "LongRope",
    "NoRewrite",
    "Ntk",
    "NtkByParts",
    "Resonance",
    "RopeMethod",
    "RopeTable",
    "Yarn",
    "create_method",
    "method_from_rope_parameters",
    "table_from_rope_parameters",
]

ENTRY_POINT_GROUP = "ctxext.rope_methods"

_OWN: tuple[type[RopeMethod], ...] = (
    Linear,
    Ntk,
    AdjustedTheta,
    Dynamic,
    Yarn,
    NtkByParts,
    Llama3,
    LongRope,
    Cope,
    Resonance,
    FrequencyMap,
    NoRewrite,
)


def _method_name(method: type[RopeMethod]) -> str:
    return str(method.model_fields["method"].default)


def _registry() -> tuple[dict[str, type[RopeMethod]], dict[str, str]]:
    """Methods by name, and what is wrong with those of other distributions that cannot be used."""
    methods = {_method_name(method): method for method in _OWN}
    added: dict[str, str] = {}
    broken: dict[str, str] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        by = entry.dist.name if entry.dist is not None else entry.value
        try:
            found = entry.load()
            if not (isinstance(found, type) and issubclass(found, RopeMethod)):
                raise TypeError(f"{entry.value} is no RopeMethod class")
            if _method_name(found) != entry.name:
                raise TypeError(f"its method field says '{_method_name(found)}'")
            if entry.name in methods and entry.name not in added:
                raise TypeError("ctxext has a method of that name, which is used")
            if added.setdefault(entry.name, by) != by:
                raise TypeError(f"both {added[entry.name]} and {by} add a method of that name")
        except Exception as error:  # whatever a foreign module does on import must not take ctxext down
            broken[entry.name] = f"{type(error).__name__}: {error}"
        else:
            methods[entry.name] = found
    for name in broken.keys() & added.keys():
        methods.pop(name, None)  # which of the two was meant cannot be known
    return methods, broken


METHODS, BROKEN_METHODS = _registry()

if TYPE_CHECKING:
    AnyRopeMethod = RopeMethod
else:
    # The union that a recipe's `rope` block is read as, told apart by its `method` key.
    AnyRopeMethod = Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007

# Rope types that `method_from_rope_parameters` understands; `ntk` and `theta` are `default` with another theta.
READABLE_TYPES = ("default", "linear", "proportional", "dynamic", "yarn", "llama3", "longrope")


def create_method(name: str, **parameters: Any) -> RopeMethod:
    """The method `name` with validated parameters.

    Raises:
        UsageError: unknown method, unknown parameter or bad value.
    """
    if name in BROKEN_METHODS and name not in METHODS:
        raise UsageError(
            f"the RoPE method '{name}' of another distribution cannot be used ({BROKEN_METHODS[name]})",
            where="method",
            hint="Mend or uninstall the distribution that adds it.",
        )
    if name not in METHODS:
        raise unknown_name("RoPE method", name, METHODS, where="method")
    try:
        return METHODS[name](method=name, **parameters)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise unknown_name(f"parameter of method '{name}'", key, parameter_names(METHODS[name])) from error
        accepted = ", ".join(parameter_names(METHODS[name]))
        raise UsageError(
            f"bad parameter for method '{name}': {first['msg'].removeprefix('Value error, ')}",
            where=key or name,
            got=_shortened(first.get("input")) if key and first["type"] != "missing" else None,
            expected=f"parameters of {name}: {accepted}" if accepted else f"no parameters ({name} has none)",
        ) from error


def parameter_names(method: type[RopeMethod]) -> list[str]:
    """What a user can set, sorted; `factor` is left out, being derived."""
    names = set(method.model_fields) - {"method", "factor"}
    if method in (LongRope, FrequencyMap):
        names.add("file")
    if method is NtkByParts:
        names.discard("attention_factor")
    return sorted(names)


def _shortened(value: Any) -> Any:
    text = repr(value)
    return value if len(text) <= 80 else f"{text[:77]}..."


def method_from_rope_parameters(parameters: dict[str, Any]) -> RopeMethod:
    """The method that a Hugging Face dict written by `rope_parameters` describes (the way back).

    A map comes back as `longrope`, which carries every map.

    Raises:
        UsageError: a rope type that ctxext has no method for.
    """
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        return NoRewrite(control=True)
    if rope_type in ("linear", "proportional"):
        return Linear(factor=float(parameters.get("factor", 1.0)))
    if rope_type == "dynamic":
        return Dynamic(growth=float(parameters["factor"]))
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
    if rope_type == "longrope":
        given, factor = parameters.get("attention_factor"), parameters.get("factor")
        long_factor = [float(value) for value in parameters["long_factor"]]
        short_factor = [float(value) for value in parameters["short_factor"]]
        return LongRope(
            factor=None if factor is None else float(factor),
            long_factor=long_factor,
            short_factor=None if short_factor == long_factor else short_factor,
            attention_factor=None if given is None else float(given),
        )
    raise unknown_name("rope_type", str(rope_type), READABLE_TYPES)


def table_from_rope_parameters(parameters: dict[str, Any], base: BaseRope, maximum_length: int) -> RopeTable:
    """What a model built from this Hugging Face dict rotates by, from our own formulas.

    Args:
        base: theta, rotary dimensions and the length before the dict's scaling.
        maximum_length: `max_position_embeddings`; LongRoPE's factor follows from it where the dict names none.

    Raises:
        UsageError: a rope type that ctxext has no method for.
    """
    rope_type = parameters.get("rope_type", "default")
    factor = float(parameters.get("factor") or maximum_length / base.original_length)
    if rope_type == "yarn":
        # As read here the dict decides alone; what the family's attention does on top is checked elsewhere.
        plain = replace(base, own_temperature=False)
        table = method_from_rope_parameters({**parameters, "factor": factor}).table(plain)
        mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if parameters.get("attention_factor") is None and mscale and mscale_all_dim:
            ratio = softmax_temperature(factor, mscale) / softmax_temperature(factor, mscale_all_dim)
            return replace(table, attention_factor=ratio)
        return table
    if rope_type == "dynamic":
        twice = method_from_rope_parameters(parameters).model_copy(update={"factor": 2.0})
        return twice.table(base)
    return method_from_rope_parameters({**parameters, "factor": factor}).table(base)


def softmax_temperature(factor: float, mscale: float) -> float:
    """0.1 m ln s + 1: the square root of what multi-head latent attention multiplies its softmax scale by."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
