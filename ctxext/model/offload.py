"""Layer inputs in host memory between forward and backward, for activation checkpointing.

transformers' own `activation_checkpointing_enable(offload=True)` does the same copies; here the host's share is also
visible to a trace on meta tensors, and a machine without an accelerator is told so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ctxext.errors import UsageError


def offload_layer_inputs(model: nn.Module) -> int:
    """Let every checkpointed layer of `model` keep its input in host memory.

    Returns:
        How many layers do.

    Raises:
        UsageError: no layer is checkpointed, or the model is in host memory already.
    """
    if next(model.parameters()).device.type == "cpu":
        raise already_on_host()
    layers: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    layers = [layer for layer in layers if callable(getattr(layer, "_gradient_checkpointing_func", None))]
    for layer in layers:
        layer._gradient_checkpointing_func = partial(_with_inputs_on_host, layer._gradient_checkpointing_func)
    if not layers:
        raise nothing_to_offload()
    return len(layers)


def already_on_host() -> UsageError:
    """Offloading on a machine without an accelerator."""
    return UsageError(
        "activations cannot be moved to host memory: they are there already",
        where="train.memory.offload",
        got="a model on the CPU",
        hint="Leave train.memory.offload out on machines without an accelerator.",
    )


def nothing_to_offload() -> UsageError:
    """Offloading without activation checkpoints."""
    return UsageError(
        "there are no checkpointed layers whose inputs could be kept in host memory",
        where="train.memory.offload",
        hint="Turn train.activation_checkpointing on.",
    )


def _with_inputs_on_host(checkpointed: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    # What the layer itself saves is handled by the checkpoint's own hooks inside; these see the layer's inputs only.
    with host_copies():
        return checkpointed(function, *args)


def host_copies() -> saved_tensors_hooks:
    """Saved tensors go to host memory, and come back when they are used."""
    return saved_tensors_hooks(_to_host, _to_device)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    # On meta tensors nothing is copied; pin_memory tells a trace what lies on the host.
    host = "meta" if tensor.is_meta else "cpu"
    packed = torch.empty(tensor.shape, dtype=tensor.dtype, device=host, pin_memory=tensor.device.type != "cpu")
    # In order with the kernels around it, so neither side needs to wait.
    packed.copy_(tensor, non_blocking=True)
    return tensor.device, packed


def _to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = packed
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor, non_blocking=True)
