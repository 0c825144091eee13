"""A training window for people: its text with document borders, jumps in position and what is not learned made visible.

A window is cut into stretches: runs of tokens of one document, with consecutive positions, all learned or none.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ctxext.data.packing import PackedWindow

_SHOWN_CHARACTERS = 240


@dataclass(frozen=True)
class Stretch:
    """Tokens that belong together.

    Attributes:
        begin, end: token indices in the window.
        position: of the first token; those behind it count up.
        starts_document: whether a document begins here.
        jump: positions left out before it; 0 where they go on, negative where they begin anew.
        learned: whether its tokens count as targets.
    """

    begin: int
    end: int
    position: int
    starts_document: bool
    jump: int
    learned: bool
    text: str


@dataclass(frozen=True)
class WindowView:
    """One window: its number in its epoch, and its stretches."""

    epoch: int
    index: int
    num_tokens: int
    num_targets: int
    num_facts: int
    last_position: int
    stretches: tuple[Stretch, ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def view_window(window: PackedWindow, tokenizer: Any, epoch: int, index: int) -> WindowView:
    """Cut a window where a document begins, positions jump, or learning begins or ends."""
    positions, size = window.position_ids, len(window.input_ids)
    learned = window.learned or [True] * size
    starts = set(window.document_starts)
    cuts = [
        place
        for place in range(size)
        if place == 0
        or place in starts
        or positions[place] != positions[place - 1] + 1
        or learned[place] != learned[place - 1]
    ]
    stretches = tuple(
        Stretch(
            begin=begin,
            end=end,
            position=positions[begin],
            starts_document=begin in starts,
            jump=positions[begin] - positions[begin - 1] - 1 if begin else 0,
            learned=learned[begin],
            text=tokenizer.decode(window.input_ids[begin:end]),
        )
        for begin, end in zip(cuts, [*cuts[1:], size], strict=True)
    )
    return WindowView(epoch, index, size, window.num_targets, window.num_facts, max(positions, default=0), stretches)


def render_window(view: WindowView, *, full: bool = False) -> Group:
    """A window for the terminal; long stretches are shown by their ends unless `full`."""
    facts = f", {view.num_facts} synthetic fact{'s' * (view.num_facts > 1)}" if view.num_facts else ""
    masked = "" if view.num_targets >= view.num_tokens - 1 else f", {view.num_targets:,} learned"
    documents = sum(stretch.starts_document for stretch in view.stretches)
    lines: list[RenderableType] = [
        Text(
            f"Window {view.index} of epoch {view.epoch}: {view.num_tokens:,} tokens{masked}, "
            f"{documents} document starts, positions up to {view.last_position:,}{facts}",
            style="bold",
        )
    ]
    for stretch in view.stretches:
        lines.append(Text(f"-- {_border(stretch)} ".ljust(72, "-"), style="cyan"))
        text = stretch.text if full else _shortened(stretch.text)
        lines.append(Text(text, style="" if stretch.learned else "dim"))
    return Group(*lines)


def _border(stretch: Stretch) -> str:
    """What begins here, in words that need no colour."""
    what = ["document" if stretch.starts_document else "text goes on"]
    if stretch.jump:
        what.append(f"{stretch.jump:,} skipped" if stretch.jump > 0 else "positions begin anew")
    if not stretch.learned:
        what.append("not learned")
    last = stretch.position + stretch.end - stretch.begin - 1
    return f"{', '.join(what)}: tokens {stretch.begin:,}-{stretch.end - 1:,} at {stretch.position:,}-{last:,}"


def _shortened(text: str) -> str:
    if len(text) <= 2 * _SHOWN_CHARACTERS:
        return text
    left_out = len(text) - 2 * _SHOWN_CHARACTERS
    return f"{text[:_SHOWN_CHARACTERS]}\n[... {left_out:,} characters ...]\n{text[-_SHOWN_CHARACTERS:]}"
