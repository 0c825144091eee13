"""Which attention kernel really runs: seen where PyTorch dispatches it, not read from a setting."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _KernelNames(TorchDispatchMode):
    """Collects the names of attention kernels; every backend's kernel passes here, on every device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name or "attn" in name:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def running_kernels(model: Any, num_tokens: int = 64) -> list[str]:
    """Names of the attention kernels that a maskless causal forward pass of `model` runs.

    For example `_scaled_dot_product_flash_attention_for_cpu` or `_scaled_dot_product_cudnn_attention`. An empty list
    means that attention was computed from plain matrix products: the full matrix of scores was built.
    """
    ids = torch.zeros((1, num_tokens), dtype=torch.long, device=model.device)
    with torch.no_grad(), _KernelNames() as seen:
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sorted(seen.names)
