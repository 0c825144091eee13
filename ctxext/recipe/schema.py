"""What a user can ask for: the strict, frozen recipe. Declarative; nothing in it names code to run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ctxext.recipe.base import Block, PositiveInt, Seed
from ctxext.recipe.data import DataBlock
from ctxext.recipe.gates import GatesBlock
from ctxext.rope.methods import AnyRopeMethod, Yarn

_CHECKPOINTING_ABOVE_TOKENS = 4096
Tracker = Literal["tensorboard"]


def _tensorboard() -> list[Tracker]:
    return ["tensorboard"]


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


class LoraBlock(Block):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) by peft."""

    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"


class TrainBlock(Block):
    """The optimisation.

    Attributes:
        steps: optimizer steps.
        windows_per_step: global batch, over all processes and accumulation.
        windows_per_device: windows in one forward pass.
        warmup: share of the steps with rising learning rate, 0.01-0.05 (at least one step), then cosine to zero.
        activation_checkpointing: `auto` turns it on above 4096 tokens a window.
        checkpoint_every: steps between checkpoints; a tenth of the steps when left out.
    """

    steps: PositiveInt = 200
    windows_per_step: PositiveInt = 8
    windows_per_device: PositiveInt = 1
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    warmup: Annotated[float, Field(ge=0.01, le=0.05)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    activation_checkpointing: Literal["auto"] | bool = "auto"
    checkpoint_every: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2
    trackers: list[Tracker] = Field(default_factory=_tensorboard)
    seed: Seed = 0

    def uses_activation_checkpointing(self, window_tokens: int) -> bool:
        """What `auto` becomes for windows of this length."""
        if self.activation_checkpointing == "auto":
            return window_tokens > _CHECKPOINTING_ABOVE_TOKENS
        return self.activation_checkpointing


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


class Recipe(Block):
    """The whole job.

    Attributes:
        on_existing: for a model whose RoPE is scaled already: refuse it, replace its scaling, or compose with it.
    """

    model: ModelBlock
    rope: AnyRopeMethod = Yarn()
    on_existing: Literal["refuse", "replace", "compose"] = "refuse"
    target_length: PositiveInt
    data: DataBlock = DataBlock()
    lora: LoraBlock = LoraBlock()
    train: TrainBlock = TrainBlock()
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
