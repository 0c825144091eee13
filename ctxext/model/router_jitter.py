"""Noise on the inputs of routers while training, against experts that collapse.

Switch Transformers multiply a router's input by uniform noise around one (Fedus et al. 2021, arXiv:2101.03961, section
2.4: exploration). Only the router sees it; the experts get the tokens as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctxext.model.routers import routers_of


def add_router_jitter(model: nn.Module, share: float) -> int:
    """Multiply what routers see by noise between 1 - `share` and 1 + `share`, in training mode.

    The noise comes from the global random numbers, which activation checkpoints repeat in their second pass.

    Returns:
        How many routers do.
    """
    routers = routers_of(model)
    for router in routers:
        router.module.register_forward_pre_hook(partial(_jittered, share))
    return len(routers)


def _jittered(share: float, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not module.training:
        return None
    hidden: Tensor = given[0]
    # In float32: between 0.99 and 1.01 bfloat16 has four numbers.
    noise = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device).uniform_(1.0 - share, 1.0 + share)
    return (hidden * noise).to(hidden.dtype), *given[1:]
