"""A curriculum: every stage is a run of its own, which starts from the checkpoint that the stage before has merged.

The last stage's run is the recipe's folder itself; the others lie in `stages/` below it. All positions are rewritten
from the original ones: a stage replaces the scaling of the stage before, its factor is not multiplied onto it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ctxext.errors import RecipeError
from ctxext.files import read_json, write_text_atomic
from ctxext.model.load import load_config, resolve_source, weights_fingerprint
from ctxext.pipeline.extend import Origin, extend, output_folder
from ctxext.pipeline.reporter import Reporter
from ctxext.pipeline.run_folder import recipe_yaml
from ctxext.recipe.schema import Recipe, stage_recipe
from ctxext.rope.patchers import apply_method
from ctxext.rope.portable import exported_form
from ctxext.train.inexact import records

RECIPE_NAME = "curriculum.yaml"


@dataclass(frozen=True)
class Stage:
    """One stage, ready to be planned or run.

    Attributes:
        recipe: of the stage by itself; from the second stage on it names the merged checkpoint of the stage before.
        plannable: the same, but on the recipe's own model, which is there before anything has run.
    """

    number: int
    count: int
    recipe: Recipe
    plannable: Recipe

    @property
    def title(self) -> str:
        """'Stage 1 of 2: yarn to 32,768 tokens'."""
        return f"Stage {self.number} of {self.count}: {self.recipe.rope.method} to {self.recipe.target_length:,} tokens"


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages in order.

    Raises:
        RecipeError: a stage whose checkpoint could not be trained further.
    """
    assert recipe.stages is not None
    folder, count = output_folder(recipe), len(recipe.stages)
    stages: list[Stage] = []
    for number in range(count):
        last = number + 1 == count
        own = folder if last else folder / "stages" / str(number + 1)
        plain = stage_recipe(recipe, number).model_copy(update={"output_dir": str(own)})
        if not last:
            _require_plain_form(plain, number)
        started = plain
        if stages:
            before = Path(str(stages[-1].recipe.output_dir)) / "merged"
            model = plain.model.model_copy(update={"source": str(before), "revision": None})
            started = plain.model_copy(update={"model": model, "on_existing": "replace"})
        stages.append(Stage(number + 1, count, started, plain))
    return stages


def run_recipe(recipe: Recipe, reporter: Reporter, *, last_stage: str = "report", allow_inexact: bool = False) -> Path:
    """Run (or go on with) a recipe, in stages or not, and return its run folder.

    Raises:
        CtxextError: see `extend`.
    """
    run = extend if recipe.stages is None else extend_in_stages
    return run(recipe, reporter, last_stage=last_stage, allow_inexact=allow_inexact)


def extend_in_stages(
    recipe: Recipe, reporter: Reporter, *, last_stage: str = "report", allow_inexact: bool = False
) -> Path:
    """Run (or go on with) all stages and return the last one's run folder.

    Raises:
        CtxextError: see `extend`; finished stages stay.
    """
    started = time.monotonic()
    stages = stages_of(recipe)
    folder = output_folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / RECIPE_NAME, recipe_yaml(recipe))
    source = resolve_source(recipe.model.source, recipe.model.revision)
    config = load_config(source)
    done: list[dict[str, object]] = []
    for stage in stages:
        reporter.info(stage.title)
        origin = Origin(source, config, weights_fingerprint(source, config), list(done)) if done else None
        final = stage.number == stage.count
        until = last_stage if final else "merge"
        run = extend(
            stage.recipe, reporter, last_stage=until, origin=origin, started=started, allow_inexact=allow_inexact
        )
        plan, inexact = read_json(run / "plan.json"), records(run)
        facts = {key: plan[key] for key in ("method", "target_length", "plan_id")}
        done.append(facts | ({"inexact_resumes": inexact} if inexact else {}))
    return folder


def _require_plain_form(recipe: Recipe, number: int) -> None:
    """A checkpoint whose attention factor was folded into the weights cannot be given other positions."""
    config = load_config(resolve_source(recipe.model.source, recipe.model.revision))
    extended = apply_method(config, recipe.rope, recipe.target_length, recipe.on_existing)
    if exported_form(extended)[1]:
        raise RecipeError(
            "recipe",
            [
                f"stages.{number}.rope: {recipe.rope.method} is exported with its attention factor folded into the "
                "weights, which a later stage cannot take back; use yarn, linear, ntk, theta or llama3 before the last "
                "stage"
            ],
        )
