"""The optimisation: `train` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ctxext.recipe.base import Block, PositiveInt, Seed
from ctxext.recipe.memory import MemoryBlock
from ctxext.recipe.monitors import MonitorsBlock, PeriodicBlock

_CHECKPOINTING_ABOVE_TOKENS = 4096
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


def num_warmup_steps(steps: int, warmup: float) -> int:
    """Steps with a rising learning rate: the share `warmup` of all, at least one."""
    return max(round(steps * warmup), 1)


def _tensorboard() -> list[Tracker]:
    return ["tensorboard"]


class TrainBlock(Block):
    """The optimisation.

    Attributes:
        steps: optimizer steps.
        windows_per_step: global batch, over all processes and accumulation.
        windows_per_device: windows in one forward pass.
        warmup: share of the steps with rising learning rate, 0.01-0.25 (at least one step).
        decay: how it falls afterwards: `cosine` to zero, or `inverse-sqrt`, as one over the square root of the step.
        weight_decay: of matrices alone; norms, biases and other vectors that train are never decayed.
        optimizer: `adamw`, or `adamw-8bit` (moments in 8 bits, by bitsandbytes: the extra `qlora`).
        attention: which implementation computes attention; `auto` chooses and says what.
        allow_slow: train although attention falls back to a slow path, or a setting costs more than 30% of the speed.
        compile: compile the decoder layers with torch.compile.
        probe: try the largest step before the first one, and compare its memory with the plan.
        non_finite: what a loss or gradient that is not finite does: `stop` the run, or `skip` the step (at most three
            in a row).
        max_hours: stop in time to be done, saved and resumable, before so many hours have passed since the start.
        loss: what computes the loss from hidden states, without the logits of a window: `torch`, in chunks, on every
            device; or `liger`, the kernels of the extra `liger` on CUDA.
        router_loss: what the auxiliary loss of a mixture-of-experts model's routers is multiplied with; as the model's
            config says when left out, 0 for none.
        router_jitter: noise on the inputs of routers, as a share of them (0.01: times 0.99 to 1.01); against experts
            that collapse (Fedus et al. 2021, arXiv:2101.03961, section 2.4).
        activation_checkpointing: `auto` turns it on above 4096 tokens a window.
        memory: what else saves memory, and at what price.
        monitors: what is watched while training.
        evaluate: a small evaluation every so many steps.
        checkpoint_every: steps between checkpoints; a tenth of the steps when left out.
    """

    steps: PositiveInt = 200
    windows_per_step: PositiveInt = 8
    windows_per_device: PositiveInt = 1
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    warmup: Annotated[float, Field(ge=0.01, le=0.25)] = 0.05
    decay: Literal["cosine", "inverse-sqrt"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    attention: Literal[
        "auto", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"
    ] = "auto"
    allow_slow: bool = False
    compile: bool = False
    probe: bool = True
    non_finite: Literal["stop", "skip"] = "stop"
    max_hours: Annotated[float, Field(gt=0)] | None = None
    loss: Literal["torch", "liger"] = "torch"
    router_loss: Annotated[float, Field(ge=0)] | None = None
    router_jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    activation_checkpointing: Literal["auto"] | bool = "auto"
    memory: MemoryBlock = MemoryBlock()
    monitors: MonitorsBlock = MonitorsBlock()
    evaluate: PeriodicBlock | None = None
    checkpoint_every: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2
    trackers: list[Tracker] = Field(default_factory=_tensorboard)
    seed: Seed = 0

    def uses_activation_checkpointing(self, window_tokens: int) -> bool:
        """What `auto` becomes for windows of this length."""
        if self.activation_checkpointing == "auto":
            return window_tokens > _CHECKPOINTING_ABOVE_TOKENS
        return self.activation_checkpointing

    @property
    def moment_bytes(self) -> int:
        """Bytes of each of AdamW's two moments, for one parameter."""
        return 1 if self.optimizer == "adamw-8bit" else 4
