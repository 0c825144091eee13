"""What bitsandbytes allocates, without its kernels, on meta tensors: linear layers in 4 bits, moments in 8.

Weights lie packed, two a byte, with the scales of their blocks beside them. A pass makes the scales in float32 and then
the whole weight in the dtype of computation, uses it and drops it; the backward pass does the same once more, because
only the packed weight is kept (bitsandbytes' `MatMul4Bit`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

# Weights with a scale of their own; scales with a scale of their own (double quantisation).
_BLOCK, _OUTER_BLOCK = 64, 256
_NUM_CODES, _NUM_OUTER_CODES = 16, 256
# Elements below which moments stay in float32, and that share a scale above.
_SMALLEST_8_BIT, _MOMENT_BLOCK = 4096, 256


class TracedLinear4bit(nn.Linear):
    """Stands for a 4-bit layer of the same size: its numbers mean nothing, its allocations are bitsandbytes'."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta", dtype=plain.weight.dtype)
        dtype = self.weight.dtype
        count = self.weight.numel()
        num_blocks = -(-count // _BLOCK)
        packed = torch.empty(-(-count // (2 * dtype.itemsize)), 1, dtype=dtype, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias
        for name, size, kind in (
            ("absmax", num_blocks, torch.uint8),
            ("nested_absmax", -(-num_blocks // _OUTER_BLOCK), torch.float32),
            ("code", _NUM_CODES, torch.float32),
            ("nested_code", _NUM_OUTER_CODES, torch.float32),
            ("offset", 1, torch.float32),
        ):
            self.register_buffer(name, torch.empty(size, dtype=kind, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        result: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return result

    def whole_weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in]: allocates what dequantising allocates."""
        scales = torch.empty(self.get_buffer("absmax").numel(), dtype=torch.float32, device="meta")
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        del scales
        return weight


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: TracedLinear4bit) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.whole_weight(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.whole_weight(gradient.dtype), None


def quantise_for_trace(model: nn.Module, names: Iterable[str]) -> None:
    """Replace linear layers of a model on the meta device."""
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, TracedLinear4bit(layer))


def moments_in_8_bits(parameter: Tensor) -> list[Tensor]:
    """Both of AdamW's moments of a parameter, with their scales."""
    count = parameter.numel()
    if count < _SMALLEST_8_BIT:
        return [torch.empty(count, dtype=torch.float32, device="meta") for _ in range(2)]
    return [
        torch.empty(size, dtype=dtype, device="meta")
        for size, dtype in ((count, torch.uint8), (-(-count // _MOMENT_BLOCK), torch.float32))
        for _ in range(2)
    ]
