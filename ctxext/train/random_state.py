"""The random state of every process: stored in checkpoints, and proof of whether a training draws random numbers."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

# CUDA's state is a seed and an offset, eight bytes each; the offset counts what was drawn.
_OFFSET_START = 8


def seed_process(accelerator: Accelerator, seed: int) -> None:
    """Each process its own numbers."""
    torch.manual_seed(seed + accelerator.process_index)


def random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """States of all processes, `[P, bytes]`, on the CPU; `cuda` where that is the device."""
    device = accelerator.device
    mine = torch.get_rng_state().to(device)
    states = {"cpu": accelerator.gather(mine[None]).cpu()}
    if device.type == "cuda":
        states["cuda"] = accelerator.gather(torch.cuda.get_rng_state(device).to(device)[None]).cpu()
    return {key: value.contiguous() for key, value in states.items()}


def set_random_state(accelerator: Accelerator, states: dict[str, Tensor]) -> None:
    """Put this process's stored state back."""
    index = accelerator.process_index
    torch.set_rng_state(states["cpu"][index].clone())
    if "cuda" in states and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][index].clone(), accelerator.device)


def nothing_drawn(states: dict[str, Tensor], seed: int) -> bool:
    """Whether all states are still those that `seed_process` made: then any number of processes computes the same."""
    for index, state in enumerate(states["cpu"]):
        if not torch.Generator().manual_seed(seed + index).get_state().equal(state):
            return False
    return not any(bool(state[_OFFSET_START:].any()) for state in states.get("cuda", ()))
