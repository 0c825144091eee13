"""One window shared by several processes: each has a part of its tokens, and attention reaches all of them.

The engine is axolotl-ringmaster, an attention function registered with transformers: Ulysses (Jacobs et al. 2023,
arXiv:2309.14509) exchanges heads for tokens around the model's own attention, the ring (Liu et al. 2023,
arXiv:2310.01889) passes keys and values on. Everything else in a decoder treats tokens one by one.

Targets are shifted before the window is divided, so no token loses its successor. Each process's loss is the sum over
its own tokens, so the sum over processes is the window's, and so are the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ctxext.errors import UnsupportedModelError
from ctxext.planning.parallel_plan import ParallelPlan
from ctxext.rope.families import text_config
from ctxext.train.step import SummedLoss

# Of the window that proves the engine: tokens of each part, and how far the positions jump behind the first part.
_PROOF_TOKENS = 48
_PROOF_GAP = 11
# Relative, of a summed loss.
_ROUNDING = 1e-5
_HALF_ROUNDING = 1e-2


@dataclass(frozen=True)
class SequenceSplit:
    """Which part of every window a process has.

    Attributes:
        rank: among those that share a window.
        size: how many they are.
    """

    rank: int
    size: int

    def __call__(self, *windows: Tensor) -> tuple[Tensor, ...]:
        """The part [B, S / size] of tensors [B, S]."""
        return tuple(tensor.chunk(self.size, dim=1)[self.rank].contiguous() for tensor in windows)


def share_windows(loss: SummedLoss, model: Any, plan: ParallelPlan, device: torch.device) -> None:
    """Let `plan.sequence` processes share every window from now on; all processes call this.

    Args:
        loss: gets its part of every window.
        model: the transformers model inside, whose attention reaches over all parts.

    Raises:
        UnsupportedModelError: together they do not compute what each of them computes alone.
    """
    proof = _Proof(loss, text_config(model.config).vocab_size, plan.sequence, device)
    alone = proof.loss_of_window()
    split, group = _start_engine(model, plan, device)
    loss.split = split
    together = proof.loss_of_window()
    dist.all_reduce(together, group=group)
    proof.compare(alone, together, model)


def _start_engine(model: Any, plan: ParallelPlan, device: torch.device) -> tuple[SequenceSplit, dist.ProcessGroup]:
    from ringmaster import Backend, RingmasterConfig, RotateMethod, setup

    mesh = init_device_mesh(device.type, (plan.replicas, plan.sequence), mesh_dim_names=("windows", "cp"))
    text = text_config(model.config)
    ring = plan.engine == "ring"
    config = RingmasterConfig(
        size=plan.sequence,
        backend=Backend.RING if ring else Backend.ULYSSES,
        ulysses_size=1 if ring else plan.sequence,
        ring_size=plan.sequence if ring else 1,
        rotate_method=RotateMethod.ALLTOALL,  # keys and values are passed on, never gathered
    )
    runtime = setup(
        config,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        device_mesh=mesh,
        device_type=device.type,
        inner_attn="flash_attention_2" if ring else text._attn_implementation,
    )
    model.set_attn_implementation(runtime.attn_implementation)
    return SequenceSplit(mesh.get_local_rank("cp"), plan.sequence), mesh.get_group("cp")


class _Proof:
    """A short window whose positions skip, computed by one process and by a group of them."""

    def __init__(self, loss: SummedLoss, vocab_size: int, size: int, device: torch.device) -> None:
        self._loss = loss
        place = torch.arange(_PROOF_TOKENS * size, device=device)[None]
        self._ids = (place * 7 + 5) % vocab_size
        self._positions = torch.where(place < _PROOF_TOKENS, place, place + _PROOF_GAP)

    def loss_of_window(self) -> Tensor:
        """Of this process's part, float32."""
        self._loss.eval()  # without dropout
        with torch.no_grad():
            value: Tensor = self._loss(self._ids, self._positions)
        self._loss.train()
        return value.float()

    def compare(self, alone: Tensor, together: Tensor, model: Any) -> None:
        """Raise when they differ by more than rounding."""
        difference = abs(float(together) - float(alone)) / abs(float(alone))
        if not difference < (_ROUNDING if model.dtype == torch.float32 else _HALF_ROUNDING):
            raise UnsupportedModelError(
                "processes that share a window do not compute its loss",
                where=f"attention '{text_config(model.config)._attn_implementation}'",
                got=f"a relative difference of {difference:.1e} to one process",
            )
