"""From what stands on the command line to a checked recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctxext.errors import UsageError, did_you_mean
from ctxext.model.load import load_config, resolve_source
from ctxext.pipeline.baselines import recorded_check
from ctxext.planning.plan import length_checks, suite_check
from ctxext.recipe.load import (
    apply_overrides,
    default_document,
    find_shipped,
    read_document,
    shipped_names,
    validate_document,
)
from ctxext.recipe.schema import Recipe
from ctxext.rope.families import base_ropes


def is_recipe(what: str) -> bool:
    """Whether an argument names a recipe (a `.yaml` file or a shipped recipe) rather than a model."""
    return what.endswith((".yaml", ".yml")) or (what in shipped_names("recipes") and not Path(what).is_dir())


def recipe_of(
    what: str, overrides: Sequence[str], target_length: int | None = None, method: str | None = None
) -> Recipe:
    """The recipe that `what` names, or defaults for the model that it names.

    Raises:
        RecipeError: everything that is wrong, contradictions with the model's config included.
        UsageError: a model without a target length.
        ArtefactError, UnsupportedModelError: a model named on the command line that is not there or has no RoPE.
    """
    if is_recipe(what):
        settings = list(overrides)
        if target_length is not None:
            settings.append(f"target_length={target_length}")
        if method is not None:
            settings.append(f"rope.method={method}")
        document = apply_overrides(read_document(find_shipped(what, "recipes", "recipe")), settings)
    else:
        if target_length is None:
            recipes = shipped_names("recipes")
            near = did_you_mean(what, recipes)
            raise UsageError(
                "no recipe has this name, and a model needs --target-length",
                where="command line",
                got=what,
                expected=f"a recipe ({', '.join(recipes)} or .yaml), or MODEL --target-length N",
                hint=f"Did you mean '{near}'?" if near else None,
            )
        # First of all: without a model that can be extended the other settings mean nothing.
        base_ropes(load_config(resolve_source(what)), "replace")
        document = default_document(what, target_length, overrides, method or "yarn")
    return validate_document(document, Recipe, [length_checks, suite_check, recorded_check])
