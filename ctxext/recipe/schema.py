"""What a user can ask for: the strict, frozen recipe. Declarative; nothing in it names code to run."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ctxext.recipe.adaptation import Adaptation, LoraBlock
from ctxext.recipe.base import Block, PositiveInt
from ctxext.recipe.data import DataBlock
from ctxext.recipe.gates import GatesBlock
from ctxext.recipe.parallel import ParallelBlock
from ctxext.recipe.train import TrainBlock
from ctxext.rope.methods import AnyRopeMethod, Yarn

__all__ = [
    "DataBlock",
    "EvaluationBlock",
    "LoraBlock",
    "ModelBlock",
    "ParallelBlock",
    "Recipe",
    "StageBlock",
    "TrainBlock",
    "stage_recipe",
]


class ModelBlock(Block):
    """Which model.

    Attributes:
        source: hub id, folder, GGUF file, `package:NAME/FILE` for a file inside an installed Python package, or
            `recipes:NAME` for a model that ships with ctxext.
        revision: hub branch, tag or commit.
        dtype: of the loaded weights; `auto` is bfloat16 on an accelerator that has it and float32 elsewhere.
        description: what readers of the report should know about this model.
    """

    source: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    description: str | None = None


class EvaluationBlock(Block):
    """What is measured.

    Attributes:
        suite: name of a shipped suite or path of one.
        before: also evaluate the base model before training.
        untrained: also evaluate the extended model before training.
        control: also train and evaluate the control arm (the same job without the RoPE rewrite).
        recorded: name of a recorded baseline under evals/baselines that the report shows beside this run.
        gates: what the extended arm must reach; the run ends with exit code 6 when it does not.
    """

    suite: str = "quick"
    before: bool = True
    untrained: bool = False
    control: bool = False
    recorded: str | None = None
    gates: GatesBlock | None = None

    @model_validator(mode="after")
    def _gates_can_be_judged(self) -> EvaluationBlock:
        if self.gates is None:
            return self
        arms = {"base": self.before, "untrained": self.untrained, "control": self.control}
        rival = self.gates.better_than
        if rival is not None and not arms.get(rival, False):
            evaluated = ", ".join(name for name, asked in arms.items() if asked) or "none"
            raise ValueError(
                f"gates.better_than: {rival} is no arm that this recipe evaluates (it evaluates: {evaluated})"
            )
        if self.gates.short_context_cost is not None and not self.before:
            raise ValueError("gates.short_context_cost compares with the base model; leave evaluation.before on")
        return self


class StageBlock(Block):
    """One stage of a curriculum; what it leaves out is as in the recipe's own blocks, key by key.

    Attributes:
        target_length: of this stage.
    """

    target_length: PositiveInt
    rope: AnyRopeMethod | None = None
    data: DataBlock | None = None
    train: TrainBlock | None = None


class Recipe(Block):
    """The whole job.

    Attributes:
        stages: a curriculum of several target lengths, each trained from where the last one ended; the last stage's
            target length is the recipe's.
        adaptation: what is trained: `lora` (adapters on a frozen base), `qlora` (the same on a base in 4 bits) or
            `full` (every weight).
        parallel: how several processes share the work.
        on_existing: for a model whose RoPE is scaled already: refuse it, replace its scaling, or compose with it.
    """

    model: ModelBlock
    rope: AnyRopeMethod = Yarn()
    on_existing: Literal["refuse", "replace", "compose"] = "refuse"
    target_length: PositiveInt
    stages: Annotated[list[StageBlock], Field(min_length=2)] | None = None
    data: DataBlock = DataBlock()
    adaptation: Adaptation = "lora"
    lora: LoraBlock = LoraBlock()
    train: TrainBlock = TrainBlock()
    parallel: ParallelBlock = ParallelBlock()
    evaluation: EvaluationBlock = EvaluationBlock()
    output_dir: str | None = None

    @model_validator(mode="after")
    def _window_fits_target(self) -> Recipe:
        windows = self.data.windows
        if windows.length is not None and windows.length > self.target_length:
            raise ValueError(
                f"data.windows.length ({windows.length}) exceeds target_length ({self.target_length}); "
                "use mode: full-length"
            )
        if not self.rope.trainable:
            raise ValueError(
                f"rope.method: {self.rope.method} is for inference only: its frequencies change with every sequence's "
                "length, so there is nothing fixed to train; use ntk, or `ctxext patch` without training"
            )
        if self.rope.method == "none" and self.evaluation.control:
            raise ValueError(
                "evaluation.control asks for a control arm, but this recipe (rope.method: none) already is one"
            )
        if self.rope.method == "none" and self.evaluation.untrained:
            raise ValueError("evaluation.untrained with rope.method: none would repeat the base model")
        return self

    @model_validator(mode="after")
    def _lora_is_used(self) -> Recipe:
        if self.adaptation == "full" and self.lora != LoraBlock():
            raise ValueError("adaptation: full trains every weight and has no adapter; leave the block lora out")
        return self

    @model_validator(mode="after")
    def _stages_build_on_each_other(self) -> Recipe:
        if self.stages is None:
            return self
        lengths = [stage.target_length for stage in self.stages]
        if any(later < earlier for earlier, later in pairwise(lengths)):
            raise ValueError(f"stages: target lengths {lengths} must not fall from one stage to the next")
        if lengths[-1] != self.target_length:
            raise ValueError(
                f"the last stage's target_length ({lengths[-1]}) must be the recipe's ({self.target_length})"
            )
        if self.evaluation.control or self.evaluation.untrained:
            raise ValueError(
                "a recipe with stages evaluates before and after; for the control arm run it once more with "
                "rope.method: none and control: true, and compare the two runs with `ctxext compare`"
            )
        for number in range(len(self.stages)):
            stage_recipe(self, number)
        return self


def stage_recipe(recipe: Recipe, number: int) -> Recipe:
    """The recipe of one stage by itself, as if it started from the recipe's own model.

    Args:
        number: from 0.

    Raises:
        ValueError: the stage's blocks do not fit together.
    """
    assert recipe.stages is not None
    stage = recipe.stages[number]
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude={"stages"})
    values["target_length"] = stage.target_length
    values["rope"] = (stage.rope or recipe.rope).model_dump(mode="json")
    for name in ("data", "train"):
        block = getattr(stage, name)
        if block is not None:
            values[name] = _merged(values[name], block.model_dump(mode="json", exclude_unset=True))
    if number > 0:  # its base is what the stage before has merged, the adapter that started it included
        values["lora"]["start_from"] = None
    if number + 1 < len(recipe.stages):
        values["evaluation"] |= {"before": False, "recorded": None, "gates": None}
    return Recipe.model_validate(values)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with what `changes` says otherwise, blocks within blocks included."""
    merged = dict(values)
    for key, value in changes.items():
        deeper = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if deeper else value
    return merged
