"""What a piece of PyTorch work allocates and frees, on real or on meta tensors, and what was there at the peak.

Every operation passes a dispatch mode; a storage that was not there before is written down with its size, and once more
when it dies. Nothing has to be computed for that, so a model of any size can be traced on meta tensors by one core.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

# Stands for flash, variable-length and flex kernels in a trace.
FUSED = "ctxext_fused_on_meta"


@dataclass
class _Block:
    """One storage."""

    num_bytes: int
    kind: str | None
    on_host: bool
    phase: str
    operation: str
    freed_phase: str | None = None


@dataclass(frozen=True)
class Peak:
    """The moment with the most bytes.

    Attributes:
        num_bytes: on the device, everything that was registered included.
        split: bytes by kind: what was registered, by its names; `saved activations`: allocated in the phase `forward`
            and alive after it; `temporaries`: everything else.
        operation: what ran, with the shape of the largest tensor that it made.
        phase: in which phase.
        host_bytes: the most that lay in host memory at one time.
    """

    num_bytes: int
    split: dict[str, int]
    operation: str
    phase: str
    host_bytes: int


@dataclass
class _Log:
    """Blocks, and the order of what happened to them."""

    blocks: list[_Block] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)  # (block, +1 or -1)


class Ledger(TorchDispatchMode):
    """Writes down allocations while it is entered.

    Args:
        counts_kernel_buffers: also what attention kernels of CUDA devices allocate for themselves.
    """

    def __init__(self, counts_kernel_buffers: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = _Log()
        self._known: dict[int, int] = {}
        self._phase = ""
        self._counts_kernel_buffers = counts_kernel_buffers

    def register(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already, as `kind`."""
        for tensor in tensors:
            self._add(tensor, kind, False, kind)

    def rename(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Call storages `kind` from the beginning, as if they had been registered."""
        for tensor in tensors:
            number = self._known.get(_key(tensor))
            if number is not None:
                self._log.blocks[number].kind = kind

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names a part of the work."""
        self._phase = name
        yield
        self._phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        pinned = bool(kwargs.get("pin_memory"))
        leaves = tree_leaves((args, kwargs))
        if isinstance(args[0] if args else None, Tensor) and args[0].is_meta and name in _META_ANSWERS:
            func = _META_ANSWERS[name]
        if pinned and any(leaf == torch.device("meta") for leaf in leaves if isinstance(leaf, torch.device)):
            kwargs = {**kwargs, "pin_memory": False}  # which meta tensors cannot be
        if self._counts_kernel_buffers and (hidden := kernel_buffer_bytes(name, leaves)):
            self._transient(hidden, f"buffers inside {name}")
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, None, pinned, name)
        return result

    def _add(self, tensor: Tensor, kind: str | None, on_host: bool, operation: str) -> None:
        key = _key(tensor)
        if key in self._known:
            return
        storage = tensor.untyped_storage()
        shape = list(tensor.shape)
        block = _Block(storage.nbytes(), kind, on_host, self._phase, f"{operation} {shape}")
        number = len(self._log.blocks)
        self._log.blocks.append(block)
        self._log.events.append((number, 1))
        self._known[key] = number
        weakref.finalize(storage, self._forget, key, number).atexit = False

    def _transient(self, num_bytes: int, operation: str) -> None:
        number = len(self._log.blocks)
        self._log.blocks.append(_Block(num_bytes, None, False, self._phase, operation, self._phase))
        self._log.events += [(number, 1), (number, -1)]

    def _forget(self, key: int, number: int) -> None:
        self._log.blocks[number].freed_phase = self._phase
        self._log.events.append((number, -1))
        self._known.pop(key, None)

    def peak(self, phases: Iterable[str]) -> Peak:
        """The peak within some phases; what came before counts where it is still there."""
        return _peak(self._log, set(phases))


def _yes(_: Tensor) -> bool:
    """transformers asks whether a mask of ones is all ones."""
    return True


def _histogram(values: Tensor, bins: int = 100, *_: Any, **__: Any) -> Tensor:
    """Tokens of each expert."""
    return values.new_empty([bins])


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Every expert's matrix product; torch's own has no float32 on meta tensors."""
    if left.ndim == right.ndim == 2:  # a gradient of the experts' weights
        return left.new_empty([offs.shape[0], left.shape[0], right.shape[1]])
    return left.new_empty([left.shape[-2], right.shape[-1]])


# What meta tensors cannot do because they have no values, or do not do in every precision.
_META_ANSWERS = {"_local_scalar_dense": _yes, "histc": _histogram, "_grouped_mm": _grouped_product}


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _peak(log: _Log, phases: set[str]) -> Peak:
    now = highest = host_now = host_highest = 0
    at = None
    for place, (number, sign) in enumerate(log.events):
        block = log.blocks[number]
        if block.on_host:
            host_now += sign * block.num_bytes
            host_highest = max(host_highest, host_now)
            continue
        now += sign * block.num_bytes
        if now > highest and sign > 0 and block.phase in phases:
            highest, at = now, place
    if at is None:
        return Peak(0, {}, "", "", 0)
    alive: dict[int, _Block] = {}
    for number, sign in log.events[: at + 1]:
        if sign > 0:
            alive[number] = log.blocks[number]
        else:
            alive.pop(number, None)
    split: dict[str, int] = {}
    for block in alive.values():
        if not block.on_host:
            split[_kind(block)] = split.get(_kind(block), 0) + block.num_bytes
    last = log.blocks[log.events[at][0]]
    return Peak(highest, dict(sorted(split.items(), key=lambda x: -x[1])), last.operation, last.phase, host_highest)


def _kind(block: _Block) -> str:
    if block.kind is not None:
        return block.kind
    return "saved activations" if block.phase == "forward" and block.freed_phase != "forward" else "temporaries"


def kernel_buffer_bytes(name: str, leaves: list[Any]) -> int:
    """What a fused attention kernel's backward pass on CUDA allocates beside its results.

    As FlashAttention-2 in PyTorch does: the queries' gradient in float32, a float32 a row, and for grouped queries the
    keys' and values' gradients of every query head.
    """
    if not (name.startswith("_scaled_dot_product") and name.endswith("attention_backward")):
        return 0
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim == 4]
    _, query, key = tensors[:3]
    expanded = 2 * query.numel() * query.element_size() if key.shape[1] != query.shape[1] else 0
    return 4 * query.numel() + 4 * math.prod(query.shape[:3]) + expanded


@contextmanager
def fused_attention_on_meta(kernel: str) -> Iterator[None]:
    """Scaled dot product attention on meta tensors keeps what a fused kernel keeps; else it makes the scores' matrix.

    Args:
        kernel: of which device: `cuda` or `cpu`.
    """
    # Registered where autograd finds it, not as a mode: modes are not in effect inside backward(), where checkpoints
    # compute their part again.
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", partial(_fused_attention, kernel), "AutogradMeta")
    try:
        yield
    finally:
        library._destroy()


def _fused_attention(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if kernel == "cpu":
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    else:
        results = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
    output: Tensor = results[0]
    return output


def _attend_fused(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


# Registered for meta tensors alone: it has the memory of kernels that take documents, windows and caps as they are, and
# no values that could be wrong.
AttentionInterface.register(FUSED, _attend_fused)
AttentionMaskInterface.register(FUSED, _no_mask)
