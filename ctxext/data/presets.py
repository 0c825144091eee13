"""What `ctxext list data-presets` shows."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ctxext.recipe.presets import Ingredient, load_preset, preset_names


def presets_view() -> RenderableType:
    """Every shipped mixture: where it comes from, its sources with their shares, and what differs."""
    return Group(*(_mixture_view(name) for name in preset_names()))


def _mixture_view(name: str) -> RenderableType:
    mixture = load_preset(name)
    head = Text.assemble((name, "bold"), f"  {mixture.title}")
    cites = Text("\n".join(mixture.cites), style="dim")
    needs = [Text("Needs the Hugging Face hub.")] if mixture.needs_hub else []
    lines = [line for ingredient in mixture.ingredients for line in _ingredient_view(ingredient)]
    return Group(head, Padding(Group(cites, *lines, *needs), (0, 0, 1, 4)))


def _ingredient_view(ingredient: Ingredient) -> list[RenderableType]:
    source = ingredient.source
    name = source.name or ", ".join(source.paths) or source.kind
    config = f", {source.config}" if source.config else ""
    field = source.messages_field or source.text_field
    shown: list[RenderableType] = [Text(f"{source.weight:4.0%}  {ingredient.what}: {name}{config} (field {field})")]
    if ingredient.differs:
        shown.append(Padding(Text(ingredient.differs.strip(), style="italic"), (0, 0, 0, 6)))
    return shown
