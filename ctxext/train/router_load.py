"""How evenly the routers of a mixture-of-experts model spread the tokens over their experts, layer by layer.

Counted by hooks on the routers in the training steps themselves, over all processes. An expert that gets few tokens
learns little and gets fewer (Shazeer et al. 2017, arXiv:1701.06538, section 4), until a router sends every token to the
same experts. The load is reported as its *balance*: the entropy of the shares, on a scale where 0 is every token at the
same k experts and 1 is a uniform load; and as the largest load over the mean one, which is 1 + MaxVio of Wang et al.
(2024, arXiv:2408.15664).

A layer is said to collapse when the mean balance of its last ten steps is below a quarter, or below half of what its
first ten were. These two limits are this project's own: papers agree on the signs, not on a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ctxext.data.packing import PackedWindow
from ctxext.model.parts import causal_lm
from ctxext.model.routers import Router, experts_per_token, routers_of
from ctxext.train.monitors import StepEvent

_SMOOTHED_STEPS = 10
_COLLAPSED = 0.25
_FALLEN = 0.5


class RouterLoadMonitor:
    """A line every step; every `every`-th has the share of every expert.

    Args:
        every: steps from one full table to the next.
        steps: of the training; the last one has a table, as the first has.
    """

    name = "router_load"

    def __init__(self, every: int, steps: int) -> None:
        self._every = every
        self._steps = steps
        self._top_k = 1
        self._routers: list[Router] = []
        self._counts: dict[int, Tensor] = {}
        self._counting = False
        self._first: list[list[float]] = []
        self._recent: list[list[float]] = []
        self._warned: list[int] = []

    def watch(self, model: nn.Module) -> None:
        """Count the tokens of this model's routers from now on, while a step runs."""
        self._routers = routers_of(model)
        base: Any = causal_lm(model)
        self._top_k = experts_per_token(base.config)
        for number, router in enumerate(self._routers):
            router.module.register_forward_hook(partial(self._count, number))

    def _count(self, number: int, module: nn.Module, given: Any, output: Any) -> None:
        if not (self._counting and module.training):
            return
        router = self._routers[number]
        chosen = router.chosen(output, self._top_k).flatten()
        num_experts = router.logits(output).shape[-1]
        if number not in self._counts:
            self._counts[number] = chosen.new_zeros(num_experts + 1)
        # A layer that checkpoints compute twice counts twice: its shares stay what they are. Some classes mark tokens
        # without an expert by one number more than there are.
        chosen = chosen.clamp(max=num_experts)
        self._counts[number].scatter_add_(0, chosen, torch.ones_like(chosen))

    def before_step(self, step: int, windows: Sequence[PackedWindow]) -> None:
        """Begin to count."""
        self._counts.clear()
        self._counting = True

    def after_step(self, event: StepEvent) -> list[dict[str, Any]]:
        """The step's load, over all processes."""
        self._counting = False
        if not self._counts:
            return []
        shares = [_shares(self._counts[number]) for number in sorted(self._counts)]
        balances = [_balance(layer, self._top_k) for layer in shares]
        step = event.metrics.step
        line: dict[str, Any] = {
            "num_experts": max(map(len, shares)),
            "experts_per_token": self._top_k,
            "min_balance": round(min(balances), 4),
            "mean_balance": round(sum(balances) / len(balances), 4),
            "max_load": round(max(max(layer) * len(layer) for layer in shares), 3),
            "num_unused": sum(share == 0.0 for layer in shares for share in layer),
            "balance": [round(balance, 4) for balance in balances],
        }
        if event.metrics.auxiliary_loss is not None:
            line["auxiliary_loss"] = event.metrics.auxiliary_loss
        if step in (1, self._steps) or step % self._every == 0:
            line["layers"] = [self._routers[number].name for number in sorted(self._counts)]
            line["shares"] = [[round(share, 5) for share in layer] for layer in shares]
        if warning := self._warning(balances):
            line["warning"] = warning
        return [line]

    def _warning(self, balances: list[float]) -> str | None:
        if len(self._first) < _SMOOTHED_STEPS:
            self._first.append(balances)
        self._recent = [*self._recent, balances][-_SMOOTHED_STEPS:]
        if len(self._recent) < _SMOOTHED_STEPS:
            return None
        starts, now = _means(self._first), _means(self._recent)
        fallen = [
            layer
            for layer, (before, balance) in enumerate(zip(starts, now, strict=True))
            if balance < max(_COLLAPSED, _FALLEN * before) and layer not in self._warned
        ]
        if not fallen:
            return None
        self._warned += fallen
        worst = min(fallen, key=lambda layer: now[layer])
        return (
            f"routers collapse: {len(fallen)} of {len(now)} send their tokens to few experts (worst: number "
            f"{worst + 1}, balance {now[worst]:.2f}, {starts[worst]:.2f} in the first steps; 1 is uniform, 0 the same "
            f"{self._top_k} experts for all); a larger train.router_loss or train.router_jitter works against it"
        )

    def state(self) -> dict[str, Any]:
        """Balances of the first and of the last steps, and which layers were warned of."""
        return {"first": self._first, "recent": self._recent, "warned": self._warned}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's figures."""
        self._first, self._recent, self._warned = state["first"], state["recent"], state["warned"]


def _shares(counts: Tensor) -> list[float]:
    """Share of every expert in the chosen ones, over all processes."""
    total = counts[:-1].to(torch.float64)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    shares: list[float] = (total / total.sum().clamp(min=1)).tolist()
    return shares


def _balance(shares: list[float], top_k: int) -> float:
    """Entropy of the load between log k (0) and log of the number of experts (1)."""
    lowest, highest = math.log(top_k), math.log(len(shares))
    if highest <= lowest:
        return 1.0
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return (entropy - lowest) / (highest - lowest)


def _means(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]
