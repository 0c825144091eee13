"""What `ctxext list methods` and `ctxext list families` show, as rich renderables.

Methods come from the registry, other distributions' included, each with a plot of what it does to the frequencies of
one example model. Families come from the installed transformers, so the table is never out of date. Nothing here loads
torch, and only the families need transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ctxext.errors import CtxextError
from ctxext.rope.base import BaseRope, RopeMethod
from ctxext.rope.families import Family, classify
from ctxext.rope.methods import BROKEN_METHODS, METHODS, create_method, parameter_names

# The model of the plots: 32 frequencies, extended from 8,192 positions to 32,768.
EXAMPLE = BaseRope(theta=1e4, rotary_dim=64, original_length=8192)
_EXAMPLE_FACTOR = 4.0
_COUNT = EXAMPLE.rotary_dim // 2
_RISING = [float(value) for value in np.geomspace(1.0, _EXAMPLE_FACTOR, _COUNT)]
# What methods need to be drawn at all; those of other distributions that need more are listed without a plot.
_EXAMPLE_PARAMETERS: dict[str, dict[str, Any]] = {
    "none": {"control": True},
    "longrope": {"long_factor": _RISING},
    "frequency-map": {"ratios": [1.0 / value for value in _RISING]},
}
_BLOCKS, _ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .-=#"
_ROWS = 2
_LABELS = 13

_KINDS = {
    "flat": ("one RoPE for all layers", "can be extended"),
    "per layer type": ("one RoPE per layer type", "full-attention layers are extended, the others stay"),
    "only as map": ("longrope only", "extended as a frequency map"),
    "refused": ("cannot be extended", "why"),
}
_STYLES = {"flat": "green", "per layer type": "green", "only as map": "green", "refused": "yellow"}
# Where the default config of transformers is no model that anyone has released.
_CONFIG_SETTINGS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"head_dim": 128},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}


# ---- methods -------------------------------------------------------------------------------------------------------


def can_show_blocks(console: Console) -> bool:
    """Whether the console's encoding has block characters."""
    return console.encoding.lower().startswith("utf")


def methods_view(*, blocks: bool = True) -> RenderableType:
    """Every method with all that one needs to choose it; `blocks=False` draws in ASCII."""
    parts: list[RenderableType] = [
        Text(
            f"Plots: each frequency after extension, as a share of what it was, for a model with theta "
            f"{EXAMPLE.theta:g} and {EXAMPLE.rotary_dim} rotary dimensions, from {EXAMPLE.original_length} to "
            f"{round(EXAMPLE.original_length * _EXAMPLE_FACTOR)} positions.",
            style="dim",
        )
    ]
    for method in METHODS.values():
        parts += [Text(), method_view(method, blocks=blocks)]
    for name, reason in BROKEN_METHODS.items():
        parts += [Text(), Text.assemble((name, "bold yellow"), f"  another distribution's, not used: {reason}")]
    return Group(*parts)


def method_view(method: type[RopeMethod], *, blocks: bool = True) -> RenderableType:
    """One method: name and summary, then its facts, then its plot."""
    name = str(method.model_fields["method"].default)
    facts = Table.grid(padding=(0, 1))
    facts.add_column(width=_LABELS, style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("when", method.when)
    facts.add_row("parameters", Text(", ".join(_parameters(method)) or "none", overflow="fold"))
    if not method.trainable:
        facts.add_row("training", Text("no: inference only", style="yellow"))
    facts.add_row("read by", method.read_by)
    if method.source != "-":
        facts.add_row("source", method.source)
    if not method.__module__.startswith("ctxext."):
        facts.add_row("added by", method.__module__)
    for number, line in enumerate(plot(name, blocks=blocks)):
        facts.add_row("" if number else "new / base", Text(line, no_wrap=True, overflow="crop"))
    title = Text.assemble((name, "bold cyan"), "  ", method.summary)
    return Group(title, Padding(facts, (0, 0, 0, 2)))


def _parameters(method: type[RopeMethod]) -> list[str]:
    """'beta_fast (32.0)', with the default in brackets."""
    shown = []
    for name in parameter_names(method):
        field = method.model_fields.get(name)
        if field is None:
            shown.append(f"{name} (instead of the rest)")
        elif field.is_required():
            shown.append(f"{name} (must be {'true' if get_args(field.annotation) == (True,) else 'given'})")
        elif field.default is None:
            shown.append(name)
        else:
            shown.append(f"{name} ({_plain(field.default)})")
    return shown


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def example_ratios(name: str) -> tuple[np.ndarray[Any, np.dtype[np.float64]], float] | None:
    """New over base frequency by index, and the attention factor, for the example; None when it needs parameters."""
    try:
        method = create_method(name, factor=_EXAMPLE_FACTOR, **_EXAMPLE_PARAMETERS.get(name, {}))
        table = method.table(EXAMPLE)
    except CtxextError:
        return None
    return table.inv_freq.astype(np.float64) / EXAMPLE.inv_freq(), table.attention_factor


def plot(name: str, *, blocks: bool = True) -> list[str]:
    """The example's ratios as two lines of bars on a scale from 0 to 1, with a line of labels below."""
    found = example_ratios(name)
    if found is None:
        return ["depends on its parameters"]
    ratios, attention_factor = found
    left, right = ("▕", "▏") if blocks else ("|", "|")
    upper, lower = bars(ratios, blocks=blocks)
    example = " (example)" if name in ("longrope", "frequency-map") else ""
    attention = f"  cos and sin x {attention_factor:.3f}" if attention_factor != 1.0 else ""
    return [
        f"1 {left}{upper}{right}{attention}",
        f"0 {left}{lower}{right}  slowest x {ratios[-1]:.3g}{example}",
        "   fastest" + "slowest".rjust(_COUNT - len("fastest")),
    ]


def bars(ratios: Iterable[float], *, blocks: bool = True) -> list[str]:
    """Values between 0 and 1 as `_ROWS` lines of bars, the upper line first; what is not 0 shows."""
    levels = _BLOCKS if blocks else _ASCII_BLOCKS
    height = len(levels) - 1
    rows: list[str] = []
    filled = [0.0 if value <= 0 else min(max(value, 0.0), 1.0) * _ROWS * height for value in ratios]
    for row in reversed(range(_ROWS)):
        inside = [min(max(value - row * height, 0.0), height) for value in filled]
        rows.append("".join(levels[round(value)] for value in inside))
    return rows


# ---- families ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A causal family by the name that transformers knows it under."""

    name: str
    family: Family


def families() -> list[tuple[str, Family]]:
    """Every causal family of the installed transformers with its classification, by model_type.

    Only default configs are made, no model: about two seconds, most of them imports.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # default configs of odd families warn about themselves
    try:
        return [(name, _default_family(name)) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    finally:
        logging.set_verbosity(level)


def _default_family(name: str) -> Family:
    from transformers import CONFIG_MAPPING

    try:
        return classify(CONFIG_MAPPING[name](**_CONFIG_SETTINGS.get(name, {})))
    except Exception:  # transformers itself refuses to make some; their checks raise whatever they like
        return Family(name, "refused", "transformers makes no default config of it")


def families_table(match: str | None = None) -> Table:
    """The families, those that are alike on one line; with `match`, those whose name contains it, a line each."""
    from transformers import __version__

    rows = [_Row(name, family) for name, family in families() if match is None or match.lower() in name]
    kinds = [kind for kind in _KINDS if any(row.family.kind == kind for row in rows)]
    count = sum(row.family.kind != "refused" for row in rows)
    title = f"Causal language models of transformers {__version__}: {count} of {len(rows)} can be extended"
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, expand=True, padding=(0, 1), box=None
    )
    table.add_column(ratio=3, overflow="fold")
    table.add_column(ratio=2, style="dim", overflow="fold")
    for kind in kinds:
        of_kind = [row for row in rows if row.family.kind == kind]
        table.add_row()
        heading, meaning = _KINDS[kind]
        table.add_row(Text(f"{heading} ({len(of_kind)})", style=f"bold {_STYLES[kind]}"), Text(meaning, style="bold"))
        for names, reason in _grouped(of_kind) if match is None else _one_by_one(of_kind):
            table.add_row(Padding(Text(names), (0, 0, 0, 2)), Text(reason))
    return table


def _one_by_one(rows: Sequence[_Row]) -> list[tuple[str, str]]:
    return [(row.name, _reason(row.family)) for row in rows]


def _grouped(rows: Sequence[_Row]) -> list[tuple[str, str]]:
    """Families of the same reason together; a number in it stands in brackets behind the family."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        reason = _reason(row.family)
        numbers = re.findall(r"\b\d+\b", reason)
        alike = re.sub(r"\b\d+\b", "(n)", reason) if len(numbers) == 1 else reason
        groups.setdefault(alike, []).append(f"{row.name} ({numbers[0]})" if len(numbers) == 1 else row.name)
    ordered = sorted(groups.items(), key=lambda group: (group[0] != "", -len(group[1]), group[0]))
    return [(", ".join(names), reason) for reason, names in ordered]


def _reason(family: Family) -> str:
    """The reason without what the table says anyway."""
    reason = family.reason.removeprefix(f"'{family.model_type}' ").removesuffix(": there is no RoPE to rewrite")
    return reason.removeprefix("cannot be extended by rewriting one RoPE: ")
