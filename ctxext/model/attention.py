"""Which attention really runs: seen where PyTorch dispatches its kernels, not read from a setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctxext.errors import ResourceError, UnsupportedModelError
from ctxext.model.attention_choice import AttentionChoice

# Tokens of the window that proves it: a prime that is no model's width, so that a matrix of all by all is known by it.
_PROOF_TOKENS = 101
_FIRST_DOCUMENT = 40
_FUSED = (
    "attention_math_for_mps",
    "cudnn_attention",
    "efficient_attention",
    "flash",
    "flex_attention",
    "fused_attention",
    "varlen_attn",
)
# Rounding of a loss that may change although nothing reached it: routed experts compute other groups of tokens.
_ROUNDING = {torch.float32: 1e-5}
_HALF_ROUNDING = 4e-3


class _KernelNames(TorchDispatchMode):
    """Collects the names of attention kernels, and of what makes a matrix of all tokens by all tokens.

    Every backend's kernel passes here, on every device; flex_attention alone is not compiled under a mode.
    """

    def __init__(self, num_tokens: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.matrices: set[str] = set()
        self._square = (num_tokens, num_tokens)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name or "attn" in name:
            self.names.add(name)
        elif "attn" in func.namespace:  # packages that call their operator `fwd`
            self.names.add(f"{func.namespace}::{name}")
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.ndim > 2 and tensor.shape[-2:] == self._square:
                self.matrices.add(name)
        return result


def running_kernels(model: Any, num_tokens: int = 64) -> list[str]:
    """Names of the attention kernels that a maskless causal forward pass of `model` runs.

    For example `_scaled_dot_product_flash_attention_for_cpu` or `_scaled_dot_product_cudnn_attention`. An empty list
    means that attention was computed from plain matrix products: the full matrix of scores was built.
    """
    ids = torch.zeros((1, num_tokens), dtype=torch.long, device=model.device)
    with torch.no_grad(), _KernelNames() as seen:
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sorted(seen.names)


@dataclass(frozen=True)
class Proving:
    """How training computes its loss, for `prove_attention`.

    Attributes:
        loss: the prepared loss module, called as `SummedLoss` is; left in training mode.
        backward: from a loss.
        vocab_size: of the model.
        dtype: that attention computes in.
        device: of the inputs.
        isolated: whether the recipe isolates the documents of a window.
    """

    loss: nn.Module
    backward: Callable[[Tensor], None]
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    isolated: bool


def prove_attention(choice: AttentionChoice, proving: Proving, allow_slow: bool = False) -> list[str]:
    """Train on one short window and see which kernels computed attention, forward and backward.

    Leaves gradients behind, and draws random numbers where the model has dropout.

    Returns:
        Names of the kernels; none when attention was computed from plain matrix products.

    Raises:
        ResourceError: no fused kernel ran, or a matrix of all tokens by all tokens was made, where the choice is not to
            be slow; and `allow_slow` is off.
        UnsupportedModelError: a token sees what it must not, or does not see what it must.
    """
    _prove_reach(choice, proving)
    proving.loss.train()
    positions = torch.arange(_PROOF_TOKENS, device=proving.device)[None]
    if proving.isolated:
        positions = torch.where(positions < _FIRST_DOCUMENT, positions, positions - _FIRST_DOCUMENT)

    def step() -> None:
        ids = _ids(proving)
        proving.backward(proving.loss(input_ids=ids, position_ids=positions, isolated=proving.isolated))

    names, matrices = _kernels_of(choice.implementation, step, proving.device)
    fused = [name for name in names if any(part in name.lower() for part in _FUSED)]
    if choice.slow is None and (matrices or not fused) and not allow_slow:
        made = f" ({', '.join(sorted(matrices))})" if matrices else ""
        raise ResourceError(
            "attention does not run on a fused kernel here: it makes a matrix of all tokens by all tokens" + made,
            where="train.attention",
            got=f"{choice.implementation}, which ran {', '.join(names) or 'plain matrix products'}",
            expected="a flash, cuDNN, memory-efficient or flex kernel without a mask",
            hint="Try another train.attention, or model.dtype: bfloat16 on an accelerator; "
            "train.allow_slow=true trains all the same.",
        )
    return names


def _kernels_of(implementation: str, step: Callable[[], None], device: torch.device) -> tuple[list[str], set[str]]:
    if implementation != "flex_attention" and not implementation.startswith("flash_attention"):
        with _KernelNames(_PROOF_TOKENS) as seen:
            step()
        return sorted(seen.names), seen.matrices
    # Compiled kernels and those of packages are no operators of PyTorch's: the profiler names what ran on the device.
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as recorded:
        step()
    words = ("flash", "flex", "attn", "attention")
    names = {event.name.split("(")[0] for event in recorded.events()}
    return sorted(name for name in names if any(word in name.lower() for word in words)), set()


def _prove_reach(choice: AttentionChoice, proving: Proving) -> None:
    """The tokens after a jump of the positions see those before it; those of a second document do not."""
    proving.loss.eval()  # dropout would look like influence
    gap = 7
    place = torch.arange(_PROOF_TOKENS, device=proving.device)[None]
    skipping = torch.where(place < _FIRST_DOCUMENT, place, place + gap)
    reached = _influence(proving, skipping, isolated=False)
    if reached == 0:
        raise UnsupportedModelError(
            "tokens after a jump of the positions do not see those before it",
            where=f"attention '{choice.implementation}'",
        )
    if not proving.isolated:
        return
    restarting = torch.where(place < _FIRST_DOCUMENT, place, place - _FIRST_DOCUMENT)
    leaked = _influence(proving, restarting, isolated=True)
    if leaked > max(_ROUNDING.get(proving.dtype, _HALF_ROUNDING), 1e-3 * reached):
        raise UnsupportedModelError(
            "tokens of one document see another one, although data.windows.positions isolates them",
            where=f"attention '{choice.implementation}'",
            got=f"a relative change of the loss of {leaked:.1e}",
            expected="0",
        )


@torch.no_grad()
def _influence(proving: Proving, positions: Tensor, isolated: bool) -> float:
    """Relative change of the second document's loss when the first one's tokens change."""
    learned = torch.arange(_PROOF_TOKENS, device=proving.device)[None] > _FIRST_DOCUMENT
    losses = []
    for change in (0, 1):
        ids = _ids(proving)
        ids[:, :_FIRST_DOCUMENT] = (ids[:, :_FIRST_DOCUMENT] + change) % proving.vocab_size
        loss = proving.loss(input_ids=ids, position_ids=positions, learned=learned, isolated=isolated)
        losses.append(float(loss))
    return abs(losses[1] - losses[0]) / abs(losses[0])


def _ids(proving: Proving) -> Tensor:
    return (torch.arange(_PROOF_TOKENS, device=proving.device)[None] * 7 + 5) % proving.vocab_size
