"""Data presets: mixtures of the literature by name, as a recipe's sources.

A preset is a YAML file of hub names, fields and shares; it says what differs from the literature, and is checked for
form only: whether the hub still has the datasets is seen when they are read.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ctxext.recipe.base import Block
from ctxext.recipe.data import SourceBlock
from ctxext.recipe.load import find_shipped, read_document, shipped_names, validate_document

FOLDER = "recipes/mixtures"


class Ingredient(Block):
    """One source of a mixture.

    Attributes:
        what: what it is in the literature.
        differs: how the source here differs from that.
    """

    what: str
    differs: str | None = None
    source: SourceBlock


class Mixture(Block):
    """A mixture as its authors describe it.

    Attributes:
        cites: where shares and names were taken from.
    """

    title: str
    cites: Annotated[list[str], Field(min_length=1)]
    ingredients: Annotated[list[Ingredient], Field(min_length=1)]

    @model_validator(mode="after")
    def _shares_make_a_whole(self) -> Mixture:
        total = sum(ingredient.source.weight for ingredient in self.ingredients)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the weights of a mixture are shares and add up to 1, not {total:g}")
        return self

    @property
    def needs_hub(self) -> bool:
        """Whether a source must be fetched."""
        return any(ingredient.source.kind == "dataset" for ingredient in self.ingredients)


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return shipped_names(FOLDER)


def load_preset(name: str) -> Mixture:
    """The shipped preset of this name, or a `.yaml` file of the same form.

    Raises:
        UsageError, ArtefactError: there is none.
        RecipeError: the file is not of that form.
    """
    return validate_document(read_document(find_shipped(name, FOLDER, "data preset")), Mixture)


def preset_sources(name: str) -> list[dict[str, Any]]:
    """The sources of a preset as plain values, see `load_preset`."""
    return [ingredient.source.model_dump(exclude_defaults=True) for ingredient in load_preset(name).ingredients]
