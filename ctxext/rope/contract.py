"""What every `RopeMethod` promises, as checks that another distribution can run on a method of its own.

    from ctxext.rope.contract import assert_contract

    def test_contract():
        assert_contract(MyMethod())

The promises: it is described; its fields survive a stored recipe; its frequencies are float32, finite, positive, and
the same each time; its Hugging Face dict is plain JSON, keeps the model's own entries, and leads back to the same
frequencies and attention factor, both through ctxext and in a rotary module that transformers builds from it; and
what the class declares (`identity_at_one`, `first`, `last`, `monotone`) holds.

A method may refuse a base with a `CtxextError`, but not all of them. A method that names one number for each dimension
fits a single rotary dimension: give it bases of that one.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ctxext.errors import CtxextError
from ctxext.rope.base import BaseRope, Float32Array, RopeMethod, RopeTable
from ctxext.rope.methods import READABLE_TYPES, Yarn, table_from_rope_parameters
from ctxext.rope.reference import RELATIVE_TOLERANCE, relative_tolerance

_FACTORS = (2.0, 4.0, 7.5)
# What a class declares about its ends holds where the fastest frequency turns often within the original length, and
# the slowest next to never; in between, methods may do as they like.
_OFTEN, _NEXT_TO_NEVER = 64.0, 0.05


def _scaled_once(base: BaseRope, factor: float) -> BaseRope:
    """What `on_existing: compose` starts from: a model that YaRN has extended already."""
    method = Yarn(factor=factor)
    table = method.table(base)
    return replace(
        base,
        original_length=method.target_length(base),
        frequencies=tuple(table.inv_freq.astype(np.float64).tolist()),
        attention_factor=table.attention_factor,
    )


DEFAULT_BASES: tuple[BaseRope, ...] = (
    BaseRope(1e4, 64, 2048),
    BaseRope(1e4, 128, 4096),
    BaseRope(5e5, 128, 8192),
    BaseRope(1e4, 128, 65536),  # its slowest frequency turns more than once
    BaseRope(1e4, 64, 2048, kept=(("partial_rotary_factor", 0.5),)),
    BaseRope(1e6, 64, 32768, layer_type="full_attention"),
    BaseRope(1e4, 64, 4096, own_temperature=True),
    _scaled_once(BaseRope(1e4, 64, 2048), 4.0),
)


def assert_contract(method: RopeMethod, bases: Sequence[BaseRope] = DEFAULT_BASES) -> None:
    """Raise an AssertionError that names every broken promise."""
    problems = check_method(method, bases)
    if problems:
        raise AssertionError(f"'{method.method}' breaks the contract of a RoPE method:\n  " + "\n  ".join(problems))


def check_method(method: RopeMethod, bases: Sequence[BaseRope] = DEFAULT_BASES) -> list[str]:
    """The promises that `method` breaks, each with the first case that shows it; empty when it keeps them all.

    Args:
        method: with its parameters; without a factor it is tried at several.
        bases: the models to try it on.
    """
    broken: dict[str, list[str]] = {}
    for promise, detail in [*_check_class(method), *_check_stored(method)]:
        broken.setdefault(promise, []).append(detail)
    accepted = 0
    refusals: list[str] = []
    for base in bases:
        for factor in _FACTORS if method.factor is None else (method.factor,):
            case = _case(base, factor)
            try:
                found = list(_check_on(method, base, factor))
                accepted += 1
            except CtxextError as refusal:
                refusals.append(str(refusal))
            except Exception as error:  # whatever a foreign method raises is the finding
                broken.setdefault("refuses with a CtxextError", []).append(f"{type(error).__name__}: {error}, {case}")
            else:
                for promise, detail in found:
                    broken.setdefault(promise, []).append(f"{detail}, {case}")
    if refusals and not accepted:
        broken.setdefault("accepts some model", []).append(refusals[0])
    return [
        f"{promise}: {cases[0]}" + (f" (and {len(cases) - 1} more)" if len(cases) > 1 else "")
        for promise, cases in broken.items()
    ]


Finding = tuple[str, str]


def _case(base: BaseRope, factor: float) -> str:
    kind = ", ".join(
        word
        for word, holds in (
            ("nested", base.layer_type is not None),
            ("partly rotated", bool(base.kept)),
            ("with its own temperature", base.own_temperature),
            ("scaled already", base.frequencies is not None),
        )
        if holds
    )
    size = f"theta {base.theta:g}, {base.rotary_dim} dimensions, {base.original_length} positions"
    return f"at factor {factor:g} of a model with {size}" + (f" ({kind})" if kind else "")


def _check_class(method: RopeMethod) -> Iterator[Finding]:
    """Name and description, for `ctxext list methods`, and strict parameters."""
    kind = type(method)
    for attribute in ("summary", "when", "source", "read_by"):
        text = getattr(kind, attribute, None)
        if not isinstance(text, str) or not text.strip():
            yield "described", f"{kind.__name__}.{attribute} must be a line of text"
    if kind.model_fields["method"].default != method.method:
        yield "named", f"the method field's default is {kind.model_fields['method'].default!r}, not {method.method!r}"
    for setting, wanted in (("extra", "forbid"), ("frozen", True)):
        if kind.model_config.get(setting) != wanted:
            yield "strict", f"{kind.__name__}.model_config['{setting}'] must be {wanted!r}"


def _check_stored(method: RopeMethod) -> Iterator[Finding]:
    """A recipe is stored beside a run and read again, as a mapping and as JSON."""
    kind = type(method)
    try:
        copies = kind.model_validate(method.model_dump()), kind.model_validate_json(method.model_dump_json())
    except ValueError as error:
        yield "survives a stored recipe", f"its own fields are refused: {str(error).splitlines()[0]}"
        return
    if any(copy != method for copy in copies):
        yield "survives a stored recipe", "fields change when they are written and read again"


def _check_on(method: RopeMethod, base: BaseRope, factor: float) -> Iterator[Finding]:
    target = round(base.original_length * factor)
    given = method.model_copy(update={"factor": None}).resolved(base.original_length, target) if factor > 1 else method
    table = given.table(base)
    found = list(_check_table(table, base))
    yield from found
    if found:
        return  # numbers that are no numbers would only fail everything else too
    yield from _check_determinism(given, base, table)
    if not isinstance(given.maximum_length(base), int) or given.maximum_length(base) < 1:
        yield "maximum length", f"maximum_length gives {given.maximum_length(base)!r}, not a positive integer"
        return
    yield from _check_declared(given, base, table)
    yield from _check_dict(given, base, table)


def _check_table(table: RopeTable, base: BaseRope) -> Iterator[Finding]:
    ranges = {"inv_freq": table.inv_freq}
    if table.short_inv_freq is not None:
        ranges["short_inv_freq"] = table.short_inv_freq
    for name, values in ranges.items():
        if getattr(values, "dtype", None) != np.float32:
            yield "float32", f"table().{name} is {getattr(values, 'dtype', type(values).__name__)}"
        elif values.shape != (base.rotary_dim // 2,):
            yield "one frequency for each pair of dimensions", f"table().{name} has shape {values.shape}"
        elif not np.isfinite(values).all():
            yield "finite", f"table().{name}[{int(np.argmin(np.isfinite(values)))}] is no finite number"
        elif not (values > 0).all():
            yield "positive", f"table().{name}[{int(np.argmin(values))}] is {values.min():g}"
        elif _looks_rounded(values):
            yield "float32", f"table().{name} holds numbers rounded to half precision"
    factor = table.attention_factor
    if not isinstance(factor, (int, float)) or not math.isfinite(factor) or factor <= 0:
        yield "finite", f"the attention factor is {factor!r}"


def _looks_rounded(values: Float32Array) -> bool:
    """Whether every number fits into bfloat16 or float16: no real table of frequencies does."""
    short_of_bits = values.view(np.uint32) & 0x1FFF  # the 13 bits that float16 lacks; bfloat16 lacks 16
    return len(values) >= 4 and not short_of_bits[1:].any() and len(np.unique(np.log2(values) % 1)) > 1


def _check_determinism(method: RopeMethod, base: BaseRope, table: RopeTable) -> Iterator[Finding]:
    other = replace(base, original_length=2 * base.original_length)
    again = method.table(base)
    method.model_copy(update={"factor": 2.0}).table(other)  # a method that remembers its last model would show now
    for later in (again, method.table(base), type(method).model_validate(method.model_dump()).table(base)):
        if not (np.array_equal(later.inv_freq, table.inv_freq) and later.attention_factor == table.attention_factor):
            yield "deterministic", "a second call gives other frequencies or another attention factor"
            return


def _check_declared(method: RopeMethod, base: BaseRope, table: RopeTable) -> Iterator[Finding]:
    """What the class attributes say of the frequencies."""
    kind, factor, before = type(method), method.resolved_factor(), base.inv_freq()
    after = table.inv_freq.astype(np.float64)
    ratios = after / before
    turns = base.original_length * before / (2 * math.pi)
    if turns[0] >= _OFTEN:
        yield from _check_end("first", kind.first, ratios[0], factor)
    if turns[-1] <= _NEXT_TO_NEVER:
        yield from _check_end("last", kind.last, ratios[-1], factor)
    if kind.monotone:
        rising = np.flatnonzero(np.diff(after) > after[:-1] * RELATIVE_TOLERANCE)
        raised = np.flatnonzero(ratios > 1.0 + RELATIVE_TOLERANCE)
        if len(rising):
            yield "monotone", f"frequency {rising[0] + 1} is above the one before it"
        elif len(raised):
            yield "monotone", f"frequency {raised[0]} is raised to {ratios[raised[0]]:g} times the model's"
    if kind.identity_at_one:
        at_one = method.model_copy(update={"factor": 1.0}).table(base)
        if not np.allclose(at_one.inv_freq, before, rtol=RELATIVE_TOLERANCE, atol=0):
            yield "identity at factor 1", "frequencies change"
        elif getattr(method, "attention_factor", None) is None and not math.isclose(
            at_one.attention_factor, base.attention_factor, rel_tol=1e-6
        ):  # one that the user has set stays
            yield "identity at factor 1", f"the attention factor becomes {at_one.attention_factor:g}"


def _check_end(which: str, declared: str | None, ratio: float, factor: float) -> Iterator[Finding]:
    expected = {"kept": 1.0, "divided": 1.0 / factor}.get(str(declared))
    if expected is not None and not math.isclose(ratio, expected, rel_tol=RELATIVE_TOLERANCE):
        yield f"{which} frequency", f"declared {declared}, but it is {ratio:g} times the model's, not {expected:g}"
    elif declared == "lowered" and factor > 1.0 and not ratio < 1.0:
        yield f"{which} frequency", f"declared lowered, but it is {ratio:g} times the model's"


def _check_dict(method: RopeMethod, base: BaseRope, table: RopeTable) -> Iterator[Finding]:
    """The stock form, and the map where the method allows it."""
    forms = {"dict": method.rope_parameters(base)}
    with contextlib.suppress(CtxextError):  # some cannot be carried by one table
        forms["map"] = method.rope_parameters(base, as_map=True)
    for name, parameters in forms.items():
        found = list(_check_plain(parameters, base))
        if not found:
            found = [*_check_round_trip(parameters, method, base, table)]
            found += _check_in_transformers(parameters, method, base, table)
        yield from ((promise, f"{detail} (in its {name})") for promise, detail in found)


def _check_plain(parameters: Any, base: BaseRope) -> Iterator[Finding]:
    try:
        unchanged = json.loads(json.dumps(parameters, allow_nan=False)) == parameters
    except (TypeError, ValueError) as error:
        yield "plain dict", f"it cannot be written as JSON: {error}"
        return
    if not unchanged or not isinstance(parameters, dict):
        yield "plain dict", "it is not the same after it was written as JSON"
    elif parameters.get("rope_type") not in READABLE_TYPES:
        yield "plain dict", f"rope_type {parameters.get('rope_type')!r} is none that stock readers know"
    elif not isinstance(parameters.get("rope_theta"), (int, float)):
        yield "plain dict", "it does not say rope_theta"
    else:
        for key, value in base.kept:
            if parameters.get(key) != value:
                yield "plain dict", f"the model's own entry {key} is lost"


def _check_round_trip(
    parameters: dict[str, Any], method: RopeMethod, base: BaseRope, table: RopeTable
) -> Iterator[Finding]:
    """What ctxext itself reads out of the dict, as `verify` will."""
    maximum = method.maximum_length(base)
    if parameters["rope_type"] == "dynamic" and method.factor != 2.0:
        return  # its dict does not say the target length; it is read as that of twice the original length
    below = BaseRope(
        theta=float(parameters["rope_theta"]),
        rotary_dim=base.rotary_dim,
        original_length=int(parameters.get("original_max_position_embeddings") or maximum),
        kept=base.kept,
        own_temperature=base.own_temperature,
    )
    yield from _compared("round trip", table_from_rope_parameters(parameters, below, maximum), table)


def _check_in_transformers(
    parameters: dict[str, Any], method: RopeMethod, base: BaseRope, table: RopeTable
) -> Iterator[Finding]:
    maximum, target = method.maximum_length(base), method.target_length(base)
    if table.short_inv_freq is None or target > base.original_length:
        theirs = transformers_table(parameters, base, maximum, target)
        yield from _compared("transformers", theirs, table, relative_tolerance(parameters))
    if table.short_inv_freq is not None:
        short = replace(table, inv_freq=table.short_inv_freq, short_inv_freq=None)
        theirs = transformers_table(parameters, base, maximum, base.original_length)
        yield from _compared("transformers, up to the original length", theirs, short)


def _compared(
    promise: str, theirs: RopeTable, ours: RopeTable, tolerance: float = RELATIVE_TOLERANCE
) -> Iterator[Finding]:
    errors = np.abs(theirs.inv_freq / ours.inv_freq.astype(np.float64) - 1.0)
    if not (errors <= tolerance).all():
        worst = int(np.argmax(errors))
        yield (
            promise,
            f"frequency {worst} is {ours.inv_freq[worst]:.8g}, but {theirs.inv_freq[worst]:.8g} from the dict",
        )
    if not math.isclose(theirs.attention_factor, ours.attention_factor, rel_tol=1e-6):
        mine, read = ours.attention_factor, theirs.attention_factor
        yield promise, f"the attention factor is {mine:.8g}, but {read:.8g} from the dict"


def transformers_table(parameters: dict[str, Any], base: BaseRope, maximum_length: int, length: int) -> RopeTable:
    """Frequencies and attention factor of a rotary module that transformers builds from a dict.

    Args:
        parameters: the complete dict of one layer type.
        base: says the rotary dimension.
        maximum_length: `max_position_embeddings`.
        length: of the sequence that the module sees; some types follow it.
    """
    import torch
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    head_dim = round(base.rotary_dim / dict(base.kept).get("partial_rotary_factor", 1.0))
    config = GPTNeoXConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=maximum_length,
        # GPT-NeoX, which rotates a quarter of a head unless it is told otherwise, shows whether that entry is kept.
        rope_parameters={"partial_rotary_factor": 1.0, **parameters},
    )
    module: Any = GPTNeoXRotaryEmbedding(config)
    with torch.no_grad():
        module(torch.zeros(1, 1, 1), torch.tensor([[length - 1]]))
    return RopeTable(module.inv_freq.numpy().copy(), float(module.attention_scaling))
