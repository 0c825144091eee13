"""Everything that makes a training step smaller, put onto a model in one place: training and its trace use this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ctxext.errors import UsageError
from ctxext.model.offload import already_on_host, nothing_to_offload, offload_layer_inputs
from ctxext.model.parts import causal_lm
from ctxext.model.tiling import tile_modules, untile_modules
from ctxext.recipe.schema import TrainBlock


@dataclass(frozen=True)
class Savings:
    """What is saved and how.

    Attributes:
        checkpoint_every: layers from one activation checkpoint to the next; None without checkpointing.
        offload: layer inputs lie in host memory.
        tile_tokens: tokens of a tile; None when nothing is tiled.
    """

    checkpoint_every: int | None = None
    offload: bool = False
    tile_tokens: int | None = None

    def describe(self) -> str:
        """In words."""
        if self.checkpoint_every is None:
            words = ["no activation checkpointing"]
        else:
            which = "every layer" if self.checkpoint_every == 1 else f"one layer in {self.checkpoint_every}"
            words = [f"activation checkpoints of {which}" + (" in host memory" if self.offload else "")]
        if self.tile_tokens is not None:
            words.append(f"norms, MLPs and linear layers in tiles of {self.tile_tokens:,} tokens")
        return ", ".join(words)


def savings_of(train: TrainBlock, window_tokens: int) -> Savings:
    """What a recipe's choices become for windows of this length."""
    checkpointing = train.uses_activation_checkpointing(window_tokens)
    return Savings(
        checkpoint_every=train.memory.checkpoint_every_n_layers if checkpointing else None,
        offload=train.memory.offload,
        tile_tokens=train.memory.tile(window_tokens * train.windows_per_device),
    )


def check_savings(train: TrainBlock, window_tokens: int, device_type: str) -> None:
    """Refuse, before any work, savings that the loop would refuse after the first evaluation.

    Raises:
        UsageError: offloading without checkpoints, or without an accelerator; compiled layers in tiles.
    """
    savings = savings_of(train, window_tokens)
    if savings.offload and savings.checkpoint_every is None:
        raise nothing_to_offload()
    if savings.offload and device_type == "cpu":
        raise already_on_host()
    if train.compile and savings.tile_tokens is not None:
        raise UsageError(
            "compiled layers cannot compute in tiles",
            where="train.compile",
            got=f"tiles of {savings.tile_tokens:,} tokens",
            hint="Set train.memory.tile_tokens=off, or leave train.compile out.",
        )


def apply_savings(model: nn.Module, savings: Savings) -> None:
    """Put the savings onto a model that is ready to be trained.

    Raises:
        UsageError: offloading without checkpoints, or without an accelerator.
    """
    base: Any = causal_lm(model)
    _drop_adapter_input_casts(model)
    if savings.checkpoint_every is not None:
        base.activation_checkpointing_enable(every_n_layers=savings.checkpoint_every)
    if savings.offload:
        offload_layer_inputs(base)
    if savings.tile_tokens is not None:
        tile_modules(model, savings.tile_tokens)


@contextmanager
def without_savings(model: nn.Module, savings: Savings) -> Iterator[None]:
    """A model that `apply_savings` was called for, as if it had not been, for as long as the context is open."""
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]  # annotated as if all attributes were tensors
    untile_modules(model)
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        if savings.tile_tokens is not None:
            tile_modules(model, savings.tile_tokens)


def _drop_adapter_input_casts(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            cast = partial(_cast_where_needed, type(module)._cast_input_dtype, module)
            module._cast_input_dtype = cast  # type: ignore[method-assign]


def _cast_where_needed(cast: Callable[..., Any], layer: Any, x: Any, dtype: torch.dtype) -> Any:
    # peft casts an adapter's inputs to its weights' float32. Autocast would round them back to the bfloat16 that they
    # came from, so that the copy only costs memory.
    if isinstance(x, torch.Tensor) and x.dtype == _autocast_dtype(x.device.type):
        return x
    return cast(layer, x, dtype)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    if device_type == "meta":  # has no autocast; a trace stands for a step under it
        return torch.bfloat16
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
