"""Token-wise parts of a decoder layer computed in tiles along the sequence: exact, and no tile outlives its turn.

Norms, MLPs and linear layers treat every token by itself, but hold several times their input while they run: a norm a
float32 copy, an MLP three tensors of its inner width, LoRA its inputs in its own precision. In tiles those exist for
one tile at a time; the backward pass computes each tile once more. What stays is input and output. The idea is ALST's
(Bekman et al. 2025, arXiv:2506.13996); the price is one more forward pass of these parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ctxext.model.routers import modules_with_router_logits

# Classes of transformers' decoder layers that treat every token by itself, by the end of their names. A router, and a
# block with one inside, is never tiled: its logits are collected, with their gradients, for the auxiliary loss.
_TOKEN_WISE_NAMES = ("Norm", "MLP")
_SEVERAL_RESULTS = ("ZayaQKNorm",)
# On meta tensors only sizes matter, and these tiles need what all need: the first allocates a parameter's gradient,
# the second adds to it.
_TRACED_TILES = 3


def tile_modules(model: nn.Module, tile_tokens: int) -> list[str]:
    """Compute the token-wise modules of `model`'s decoder in tiles of `tile_tokens` from now on.

    To be called after adapters were added; `untile_modules` takes it back.

    Returns:
        Names of the modules.
    """
    untile_modules(model)
    names = []
    for name, module in _token_wise_modules(model):
        # The instance's own forward goes before its class's, as with Accelerate's hooks.
        module.forward = partial(_tiled_forward, module, module.forward, tile_tokens)
        names.append(name)
    return names


def untile_modules(model: nn.Module) -> None:
    """Give every module the forward back that it had."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is _tiled_forward:
            plain = forward.args[1]
            del module.forward
            if module.forward != plain:  # another wrapper was there before
                module.forward = plain


def tiled(
    function: Callable[..., Tensor],
    tile_tokens: int,
    *args: Any,
    parameters: list[nn.Parameter],
    draws_random_numbers: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`function(*args, **kwargs)`, tile by tile: the same result, the same gradients.

    Args:
        function: gives one tensor, and treats every token of its arguments by itself. Tokens lie along dimension 0 of
            vectors and matrices, along dimension 1 of [B, S, ...].
        tile_tokens: B x S of a tile at most.
        args, kwargs: tensors as long as the first one are cut; everything else goes to every tile as it is.
        parameters: what `function` uses beside its arguments and needs a gradient.
        draws_random_numbers: whether the second computation must repeat the random numbers of the first.
    """
    leaves, layout = tree_flatten((args, kwargs))
    first = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
    dim = 0 if first.ndim <= 2 else 1
    length, step = first.shape[dim], max(1, tile_tokens // (first.shape[0] if dim else 1))
    is_cut = [isinstance(leaf, Tensor) and leaf.ndim > dim and leaf.shape[dim] == length for leaf in leaves]
    left = (leaf for leaf, taken in zip(leaves, is_cut, strict=True) if not taken)
    if length <= step or not torch.is_grad_enabled() or any(isinstance(x, Tensor) and x.requires_grad for x in left):
        return function(*args, **kwargs)
    call = _Call(function, layout, leaves, is_cut, dim, range(0, length, step))
    tensors = [leaf for leaf, taken in zip(leaves, is_cut, strict=True) if taken]
    result: Tensor = _Tiles.apply(call, draws_random_numbers, parameters, *tensors, *parameters)  # type: ignore[no-untyped-call]
    return result


def autocast_as_now(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """What brings today's autocast back later. Weights cast then are not cached: their casts have no gradients."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext
    return partial(torch.autocast, device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


def _token_wise_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those of the decoder's layers, and what stands beside the layers: the last norm."""
    routers = {router.module for router in modules_with_router_logits(model)}
    for path, decoder in model.named_modules():
        layers = getattr(decoder, "layers", None)
        if isinstance(layers, nn.ModuleList):
            yield from _outermost(path, decoder, routers)


def _outermost(path: str, module: nn.Module, routers: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if _is_token_wise(child) and routers.isdisjoint(child.modules()):
            yield f"{path}.{name}", child
        elif not isinstance(child, BaseTunerLayer):  # its parts are not called by themselves
            yield from _outermost(f"{path}.{name}", child, routers)


def _is_token_wise(module: nn.Module) -> bool:
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if type(inner).__name__.endswith("Experts"):
        # Some get their tokens sorted by expert, and count on it; those that get them in order get each one's experts.
        return not {"top_k_index", "router_indices"}.isdisjoint(inspect.signature(type(inner).forward).parameters)
    if type(inner).__name__ in _SEVERAL_RESULTS:
        return False
    return isinstance(inner, nn.Linear) or type(inner).__name__.endswith(_TOKEN_WISE_NAMES)


def _tiled_forward(module: nn.Module, plain: Callable[..., Any], tile_tokens: int, *args: Any, **kwargs: Any) -> Any:
    """What a tiled module runs instead of `plain`, its own forward."""
    return tiled(
        plain,
        tile_tokens,
        *args,
        parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
        draws_random_numbers=any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in module.modules()),
        **kwargs,
    )


class _Call:
    """A call that can be made for one tile of its arguments at a time.

    The tensors that are cut are not kept here: only autograd's saved tensors keep them alive, so that whatever handles
    those (checkpoints, offloading) handles them too.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        layout: Any,
        leaves: list[Any],
        is_cut: list[bool],
        dim: int,
        starts: range,
    ) -> None:
        self.function = function
        self.dim = dim
        self._layout = layout
        self._others = [None if taken else leaf for leaf, taken in zip(leaves, is_cut, strict=True)]
        self._places = [place for place, taken in enumerate(is_cut) if taken]
        first = leaves[self._places[0]]
        self._device_type = first.device.type
        self.tiles = [(start, min(starts.step, starts.stop - start)) for start in starts]
        if first.is_meta:
            self.tiles = self.tiles[:_TRACED_TILES]
        self.precision = autocast_as_now(self._device_type)

    def pieces(self, tensors: tuple[Tensor, ...], start: int, count: int) -> list[Tensor]:
        """One tile of every tensor, as views."""
        return [tensor.narrow(self.dim, start, count) for tensor in tensors]

    def __call__(self, pieces: list[Tensor]) -> Tensor:
        leaves = list(self._others)
        for place, piece in zip(self._places, pieces, strict=True):
            leaves[place] = piece
        args, kwargs = tree_unflatten(leaves, self._layout)
        return self.function(*args, **kwargs)


class _Tiles(torch.autograd.Function):
    """Forward without a graph, tile by tile into one result; backward makes each tile's graph, uses it and drops it.

    Not `torch.utils.checkpoint` on slices: there the results of all tiles live beside their concatenation, and each
    slice's gradient is a zero-filled tensor of full length.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, draws_random_numbers: bool, parameters: list[nn.Parameter], *inputs: Tensor
    ) -> Tensor:
        tensors = inputs[: len(inputs) - len(parameters)]
        # Parameters are kept by the module anyway; a checkpoint around this would give copies of saved ones back.
        ctx.call, ctx.parameters = call, parameters
        ctx.random_state = _random_state(tensors[0].device) if draws_random_numbers else None
        ctx.save_for_backward(*tensors)
        result = None
        with call.precision():
            for start, count in call.tiles:
                piece = call(call.pieces(tensors, start, count))
                if result is None:
                    shape = list(piece.shape)
                    shape[call.dim] = tensors[0].shape[call.dim]
                    result = piece.new_empty(shape)
                result.narrow(call.dim, start, count).copy_(piece)
        assert result is not None
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call, parameters, tensors = ctx.call, ctx.parameters, ctx.saved_tensors
        needed = ctx.needs_input_grad[3 : 3 + len(tensors)]
        of_tensors = [torch.empty_like(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        of_parameters: list[Tensor | None] = [None] * len(parameters)
        with _random_numbers_from(ctx.random_state, gradient.device):
            for start, count in call.tiles:
                pieces = [piece.detach() for piece in call.pieces(tensors, start, count)]
                wanted = [piece.requires_grad_() for piece, need in zip(pieces, needed, strict=True) if need]
                with torch.enable_grad(), call.precision():
                    result = call(pieces)
                found = torch.autograd.grad(
                    result, [*wanted, *parameters], gradient.narrow(call.dim, start, count), allow_unused=True
                )
                totals = [total for total in of_tensors if total is not None]
                for total, part in zip(totals, found[: len(wanted)], strict=True):
                    place = total.narrow(call.dim, start, count)
                    place.zero_() if part is None else place.copy_(part)
                of_parameters = [_sum(*pair) for pair in zip(of_parameters, found[len(wanted) :], strict=True)]
        return None, None, None, *of_tensors, *of_parameters


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part)


def _random_state(device: torch.device) -> list[tuple[torch.device, Tensor]]:
    states = [(torch.device("cpu"), torch.get_rng_state())]
    if device.type not in ("cpu", "meta"):
        states.append((device, torch.get_device_module(device).get_rng_state(device)))
    return states


class _random_numbers_from:  # noqa: N801 - used as a context manager
    """Repeats the random numbers that followed `states`, and puts the present state back."""

    def __init__(self, states: list[tuple[torch.device, Tensor]] | None, device: torch.device) -> None:
        self._states = states
        self._before = _random_state(device) if states is not None else None

    def __enter__(self) -> None:
        _set_random_state(self._states)

    def __exit__(self, *_: object) -> None:
        _set_random_state(self._before)


def _set_random_state(states: list[tuple[torch.device, Tensor]] | None) -> None:
    for device, state in states or []:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
