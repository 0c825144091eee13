"""What `ctxext list methods` and `ctxext list families` show is complete, true and readable on a narrow terminal."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from typing import Any, Literal

import numpy as np
import pytest
from rich.console import Console
from tiny_families import causal_families

from ctxext.rope import listing
from ctxext.rope.base import BaseRope, Float64Array, RopeMethod
from ctxext.rope.families import Family
from ctxext.rope.listing import bars, can_show_blocks, example_ratios, families, families_table, methods_view, plot
from ctxext.rope.methods import METHODS, parameter_names


def shown(renderable: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    console.print(renderable)
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue()


def paragraphs(text: str) -> dict[str, str]:
    """The listing of methods, by name, with every run of spaces made one."""
    blocks = [block.split(None, 1) for block in text.split("\n\n")[1:]]
    return {name: " ".join(rest.split()) for name, rest in blocks}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("blocks", [True, False])
def test_every_method_is_shown_in_full(width: int, blocks: bool) -> None:
    text = shown(methods_view(blocks=blocks), width)
    assert max(map(len, text.splitlines())) <= width
    described = paragraphs(text)
    assert list(described) == list(METHODS)
    for name, method in METHODS.items():
        for line in (method.summary, method.when, method.read_by):
            assert line in described[name]
        assert method.source == "-" or method.source in described[name]
        for parameter in parameter_names(method):
            assert parameter in described[name]
        assert ("no: inference only" in described[name]) == (not method.trainable)
        assert "new / base 1" in described[name]
        assert "fastest slowest" in described[name]


def test_defaults_and_needed_parameters_are_said() -> None:
    described = paragraphs(shown(methods_view(), 200))
    assert "attention_factor, beta_fast (32), beta_slow (1), truncate (true)" in described["yarn"]
    assert "long_factor (must be given)" in described["longrope"]
    assert "control (must be true)" in described["none"]
    assert "parameters none" in described["linear"]


def test_ascii_plots_hold_no_other_character() -> None:
    for name in METHODS:
        assert "\n".join(plot(name, blocks=False)).isascii()
        assert not "\n".join(plot(name)).isascii()


@pytest.mark.parametrize(("encoding", "able"), [("utf-8", True), ("UTF-16", True), ("ascii", False), ("cp1252", False)])
def test_blocks_are_drawn_only_where_the_encoding_has_them(encoding: str, able: bool) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=80)
    assert can_show_blocks(console) == able
    console.print(methods_view(blocks=can_show_blocks(console)))  # raises where a character does not fit
    file.flush()


@pytest.mark.parametrize(
    ("value", "column"),
    [(0.0, "  "), (1 / 16, " ▁"), (0.25, " ▄"), (0.5, " █"), (0.75, "▄█"), (1.0, "██"), (1.7, "██"), (-1.0, "  ")],
)
def test_bars_are_to_scale(value: float, column: str) -> None:
    assert "".join(bars([value])) == column


def test_ascii_bars_are_to_scale() -> None:
    assert bars([0.0, 0.125, 0.25, 0.5, 0.75, 1.0], blocks=False) == ["    -#", " .-###"]


def test_the_plot_shows_what_the_method_does() -> None:
    ratios, attention_factor = example_ratios("yarn") or ([], 0.0)
    assert len(ratios) == 32
    assert (ratios[0], attention_factor) == (1.0, pytest.approx(1.1386, abs=1e-4))
    upper, lower, _ = plot("yarn")
    assert upper.startswith("1 ▕███")
    assert "cos and sin x 1.139" in upper
    assert lower.endswith("slowest x 0.25")
    assert plot("linear")[0] == f"1 ▕{' ' * 32}▏"
    assert "slowest x 1e-12" in plot("cope")[1]
    assert "(example)" in plot("longrope")[1]


class Needy(RopeMethod):
    """A method of another distribution that needs more than an example can know."""

    summary = "needs a strength"
    when = "in tests"
    source = "somewhere"
    method: Literal["needy"] = "needy"
    strength: float

    def inv_freq(self, base: BaseRope) -> Float64Array:
        return np.asarray(base.inv_freq() / self.strength)


def test_a_method_of_another_distribution_is_listed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "needy", Needy)
    monkeypatch.setitem(listing.BROKEN_METHODS, "gone", "AttributeError: no attribute 'Gone'")
    described = paragraphs(shown(methods_view(), 120))
    assert "added by test_listing" in described["needy"]
    assert "depends on its parameters" in described["needy"]
    assert described["gone"] == "another distribution's, not used: AttributeError: no attribute 'Gone'"
    assert "added by" not in described["yarn"]


def test_listing_methods_loads_neither_torch_nor_transformers() -> None:
    script = "import sys; from ctxext.rope.listing import methods_view; methods_view(); " + (
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"


# ---- families ------------------------------------------------------------------------------------------------------


def test_every_causal_family_of_transformers_is_listed_once() -> None:
    assert [name for name, _ in families()] == causal_families()


def test_released_models_are_not_refused_for_odd_default_configs() -> None:
    found = dict(families())
    for name in ("glm4_moe", "gemma4_assistant", "llama", "qwen3", "gpt_oss", "deepseek_v3"):
        assert found[name].kind != "refused", found[name]
    assert not any("no default config" in family.reason for family in found.values())


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_holds_every_family_and_fits(width: int) -> None:
    text = shown(families_table(), width)
    assert max(map(len, text.splitlines())) <= width
    words = set(text.replace(",", " ").split())
    assert set(causal_families()) <= words
    extendable = sum(family.kind != "refused" for _, family in families())
    assert f"{extendable} of {len(causal_families())} can be extended" in text
    for heading in (
        "one RoPE for all layers (",
        "one RoPE per layer type (",
        "longrope only (",
        "cannot be extended (",
    ):
        assert heading in text
    assert len(text.splitlines()) < 160


def test_families_of_a_name_are_listed_one_by_one_with_their_reason() -> None:
    text = shown(families_table("GPT"), 120)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "uses learned absolute positions" in lines["gpt2"]
    assert "partial rotary: 24 dimensions of a head turn" in lines["gpt_neox"]
    assert "llama" not in text
    assert "0 of 0 can be extended" in shown(families_table("no such family"))


def test_numbers_that_differ_do_not_keep_like_families_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [(f"family{size}", Family("f", "flat", f"partial rotary: {size} dimensions")) for size in (16, 32)]
    monkeypatch.setattr(listing, "families", lambda: kinds)
    (line,) = [line for line in shown(families_table(), 120).splitlines() if "family" in line]
    assert " ".join(line.split()) == "family16 (16), family32 (32) partial rotary: (n) dimensions"


def test_a_family_that_transformers_cannot_make_does_not_break_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_CONFIG_SETTINGS", {"llama": {"hidden_size": "many"}})
    found = dict(families())
    assert found["llama"] == Family("llama", "refused", "transformers makes no default config of it")


def test_the_table_is_quick() -> None:
    families()  # imports
    start = time.process_time()
    families()
    assert time.process_time() - start < 3.0
