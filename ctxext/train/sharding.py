"""Weights shared by all processes (FSDP2, Zhao et al. 2023, arXiv:2304.11277): each keeps a part of every parameter.

PyTorch's own `fully_shard`, on every device alike, so that what runs on GPUs is what two processes on a CPU were tested
with (Accelerate leaves a model on the CPU unsharded without saying so). Frozen weights may have another precision than
what trains; all that trains in one layer must have the same.

One process reads the weights. They go from it to the others layer after layer, and every process keeps its part of one
layer before the next arrives: a device holds one whole layer at most, and host memory holds the model once.

Weights in 4 bits are quantised by that one process, on its CPU, then shared and gathered as bytes. The scales of their
blocks, a thirtieth of their size, are whole in every process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ctxext.errors import UsageError
from ctxext.model.quantised import block_scales, is_in_4_bits, quantise_empty, set_block_scales


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str, *, in_4_bits: bool = False
) -> PreTrainedModel:
    """The model without weights, for the processes that get theirs from the one that reads them.

    Args:
        in_4_bits: the one that reads them quantises them (`load_quantised`).
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention
        )
    if in_4_bits:
        quantise_empty(model, dtype)
    model.eval()
    return model


def shard(loss: nn.Module, decoder: nn.Module, device: torch.device) -> None:
    """Put `loss` onto `device` and share its parameters among all processes; all of them call this.

    Args:
        loss: what is called in training; real weights in the main process, weights on `meta` or real elsewhere.
        decoder: the part of it that holds the layers.

    Raises:
        UsageError: what trains has several precisions within a layer.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in _layers(decoder):
        _require_one_precision(layer)
        _receive(layer, device)
        fully_shard(layer, mesh=mesh)
    _require_one_precision(loss)
    _receive(loss, device)
    fully_shard(loss, mesh=mesh)


def no_sync_of(loss: nn.Module) -> Any:
    """A context manager in which gradients are added up without being exchanged, as DDP's `no_sync`."""

    @contextmanager
    def no_sync() -> Iterator[None]:
        assert isinstance(loss, FSDPModule)
        loss.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            loss.set_requires_gradient_sync(True)

    return no_sync


def _layers(decoder: nn.Module) -> nn.ModuleList:
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UsageError(
            "the model's layers were not found, so its weights cannot be shared layer by layer",
            where="parallel.shard",
            got=type(decoder).__name__,
            expected="a decoder with a list of `layers`",
        )
    return layers


def _require_one_precision(module: nn.Module) -> None:
    trained = {p.dtype for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)}
    if len(trained) > 1:
        raise UsageError(
            "weights that train have several precisions, which FSDP2 cannot share together",
            where="parallel.shard",
            got=", ".join(sorted(map(str, trained))),
            hint="Train them all in float32 (model.dtype=float32), or use parallel.shard=none.",
        )


def _receive(module: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer of `module` that is not shared yet the main process's value, on `device`."""
    places = [
        (owner, kind, name, tensor)
        for owner in module.modules()
        for kind in ("_parameters", "_buffers")
        for name, tensor in getattr(owner, kind).items()
        if tensor is not None and not isinstance(tensor, DTensor)
    ]
    in_4_bits = [owner for owner, _, name, _ in places if name == "weight" and is_in_4_bits(owner)]
    scales = [block_scales(layer) if dist.get_rank() == 0 else {} for layer in in_4_bits]
    # Precisions can differ from what a model without weights has: some families keep parts in float32 when they load.
    kinds: list[Any] = [
        [(tensor.shape, tensor.dtype) for *_, tensor in places],
        [[(name, tensor.shape, tensor.dtype) for name, tensor in each.items()] for each in scales],
    ]
    dist.broadcast_object_list(kinds, src=0, device=device)
    received: dict[int, Tensor] = {}  # a tensor with two places (tied embeddings) stays one
    for (owner, kind, name, tensor), (shape, dtype) in zip(places, kinds[0], strict=True):
        if id(tensor) not in received:
            value = _broadcast(tensor.detach(), shape, dtype, device)
            is_parameter = isinstance(tensor, nn.Parameter)
            received[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
        getattr(owner, kind)[name] = received[id(tensor)]
    for layer, mine, stored in zip(in_4_bits, scales, kinds[1], strict=True):
        whole_scales = {name: _broadcast(mine.get(name), shape, dtype, device) for name, shape, dtype in stored}
        set_block_scales(layer, whole_scales)


def _broadcast(mine: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A plain tensor on `device` with the main process's numbers, which may come in a subclass (bitsandbytes')."""
    value = torch.empty(shape, dtype=dtype, device=device)
    if dist.get_rank() == 0:
        assert mine is not None
        value.copy_(mine)
    dist.broadcast(value, src=0)
    return value


@contextmanager
def whole_trained(loss: nn.Module) -> Iterator[None]:
    """Inside, what trains is whole, on the CPU of every process; all of them enter and leave together.

    For saving and nothing else: the model cannot run inside, and what is written into it is lost.
    """
    parts = [module for module in loss.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.reshard()
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for owner in loss.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad and isinstance(parameter.data, DTensor):
                replaced.append((owner, name, parameter))
    for owner, name, parameter in replaced:
        owner._parameters[name] = nn.Parameter(whole(parameter))
    try:
        yield
    finally:
        for owner, name, parameter in replaced:
            owner._parameters[name] = parameter


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, put together from its parts when it is shared; all processes call this."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous()
