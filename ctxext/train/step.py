"""One optimizer step: losses of the step's windows, normalised by the global number of target tokens.

Accumulation and processes therefore cannot change the gradient: 1 x 4, 4 x 1 and two processes give the same sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ctxext.data.packing import PackedWindow
from ctxext.errors import DivergedError
from ctxext.model.loss import IGNORE_INDEX, DecoderHead, token_losses


class SummedLoss(nn.Module):
    """The model with its loss inside, so that a distributed wrapper sees one forward pass.

    Returns the *sum* of the token losses, float32.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, learned: Tensor | None = None, isolated: bool = False
    ) -> Tensor:
        """Sum over all targets.

        Args:
            input_ids: [B, S].
            position_ids: [B, S]; jumps are allowed.
            learned: [B, S] whether a token counts as a target; all of them when None.
            isolated: tokens see their own document only; documents begin where positions do not go on.
        """
        base = self.model.get_base_model()
        parts = DecoderHead(base)
        # An explicit all-ones mask: without one transformers takes a jump in the positions for a document boundary and
        # hides everything before it. With it, SDPA still gets no mask at all and runs its causal flash kernel. Isolated
        # documents are what that boundary is for; it costs a mask of S x S.
        mask = None if isolated else torch.ones_like(input_ids)
        hidden = parts.hidden_states(input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False)
        targets = torch.full_like(input_ids, IGNORE_INDEX)
        targets[:, :-1] = input_ids[:, 1:]
        if learned is not None:
            targets[:, :-1].masked_fill_(~learned[:, 1:], IGNORE_INDEX)
        return token_losses(hidden.flatten(0, 1), parts.head, targets.flatten()).sum()


@dataclass(frozen=True)
class StepResult:
    """Mean loss per target token over all processes, and the gradient's norm before clipping."""

    loss: float
    grad_norm: float
    num_tokens: int


def run_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    windows: list[PackedWindow],
    windows_per_device: int,
    max_grad_norm: float,
) -> StepResult:
    """Forward, backward, clip and update with this process's share of the step's windows.

    Raises:
        DivergedError: a loss or gradient is not finite on any process; parameters are as before.
    """
    device = accelerator.device
    counts = torch.tensor([sum(window.num_targets for window in windows)], device=device)
    num_targets = max(int(accelerator.reduce(counts, "sum").item()), 1)
    summed = torch.zeros((), dtype=torch.float32, device=device)
    batches = [windows[i : i + windows_per_device] for i in range(0, len(windows), windows_per_device)]
    for number, batch in enumerate(batches):
        inputs = _model_inputs(batch, device)
        last = number == len(batches) - 1
        with torch.enable_grad():
            if last:
                loss = model(**inputs)
                accelerator.backward(loss * (accelerator.num_processes / num_targets))
            else:
                with accelerator.no_sync(model):
                    loss = model(**inputs)
                    accelerator.backward(loss * (accelerator.num_processes / num_targets))
        summed += loss.detach()
    mean_loss = float(accelerator.reduce(summed, "sum").item()) / num_targets
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grad_norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm))
    if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise DivergedError(
            "training produced a value that is not finite, before any parameter was changed by it",
            where="loss" if not math.isfinite(mean_loss) else "gradient norm",
            got=f"loss {mean_loss}, gradient norm {grad_norm}",
            hint="The last checkpoint is untouched; lower train.learning_rate or look at the data of this step.",
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(mean_loss, grad_norm, num_targets)


def _model_inputs(batch: list[PackedWindow], device: torch.device) -> dict[str, Any]:
    """Arguments of `SummedLoss.forward`."""
    positions = torch.tensor([window.position_ids for window in batch])
    masked = any(window.learned is not None for window in batch)
    learned = torch.tensor([window.learned or [True] * len(window.input_ids) for window in batch]) if masked else None
    return {
        "input_ids": torch.tensor([window.input_ids for window in batch], device=device),
        "position_ids": positions.to(device),
        "learned": learned.to(device) if learned is not None else None,
        # Positions of one document ascend, also where they skip.
        "isolated": bool((positions.diff(dim=-1) < 1).any()),
    }
