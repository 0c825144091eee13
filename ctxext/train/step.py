"""One optimizer step: losses of the step's windows, normalised by the global number of target tokens.

Accumulation and processes therefore cannot change the gradient: 1 x 4, 4 x 1 and two processes give the same sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ctxext.data.packing import PackedWindow
from ctxext.model.documents import cumulative_arguments, documents_of
from ctxext.model.liger import liger_summed_loss
from ctxext.model.loss import IGNORE_INDEX, DecoderHead, summed_loss
from ctxext.model.parts import causal_lm
from ctxext.model.routers import auxiliary_coefficient_in_use, forward_with_auxiliary_loss
from ctxext.rope.families import text_config

Split = Callable[..., tuple[Tensor, ...]]


class SummedLoss(nn.Module):
    """The model with its loss inside, so that a distributed wrapper sees one forward pass.

    Returns the *sum* of the token losses, float32. A mixture-of-experts model's auxiliary loss is added, times its
    coefficient and the pass's target tokens: the step's loss is then the mean over tokens plus the coefficient times
    the mean of the passes' auxiliary losses, each weighing as much as it has targets. For one pass that is what the
    model's own class computes. The auxiliary loss itself depends on what passes together, in every trainer.

    Args:
        router_loss: coefficient of the auxiliary loss; the model's own when left out.
        with_liger: Liger computes the loss from the hidden states.

    Attributes:
        parts: of the last forward pass, without gradients: [2] sum of token losses, auxiliary loss times targets.
        split: gives this process's part of [B, S] tensors, after targets were shifted; None where windows stay whole.
            The loss is then the sum over this process's tokens.
    """

    def __init__(self, model: Any, router_loss: float | None = None, with_liger: bool = False) -> None:
        super().__init__()
        self.model = model
        self._summed = liger_summed_loss if with_liger else summed_loss
        self._coefficient = auxiliary_coefficient_in_use(causal_lm(model), router_loss)
        self.parts: Tensor | None = None
        self.split: Split | None = None

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the routers of the model are trained to be balanced."""
        return self._coefficient > 0

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
        base = causal_lm(self.model)
        parts = DecoderHead(base)
        targets = torch.full_like(input_ids, IGNORE_INDEX)
        targets[:, :-1] = input_ids[:, 1:]
        if learned is not None:
            targets[:, :-1].masked_fill_(~learned[:, 1:], IGNORE_INDEX)
        if self.split is not None:
            input_ids, position_ids, targets = self.split(input_ids, position_ids, targets)
        # An explicit all-ones mask: without one transformers takes a jump in the positions for a document boundary and
        # hides everything before it. With it, SDPA still gets no mask at all and runs its causal flash kernel. Isolated
        # documents are what that boundary is for; `ctxext_documents` makes lengths of it instead of a mask.
        mask = None if isolated else torch.ones_like(input_ids)
        arguments = {"position_ids": position_ids, "attention_mask": mask, "use_cache": False}
        if isolated and text_config(base.config)._attn_implementation.startswith("flash_attention"):
            # Of a batch, transformers would take the rows for one document each.
            arguments |= cumulative_arguments(documents_of(position_ids.diff(dim=-1) != 1))
        auxiliary = None
        if self.has_auxiliary_loss:
            hidden, auxiliary = forward_with_auxiliary_loss(base, parts.decoder, input_ids=input_ids, **arguments)
        else:
            hidden = parts.hidden_states(input_ids, **arguments)
        loss = self._summed(hidden.flatten(0, 1), parts.head, targets.flatten(), parts.change)
        if auxiliary is None:
            self.parts = torch.stack([loss.detach(), torch.zeros_like(loss)])
            return loss
        weighted = auxiliary.float().to(loss.device) * (targets != IGNORE_INDEX).sum()
        self.parts = torch.stack([loss.detach(), weighted.detach()])
        return loss + self._coefficient * weighted


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean per target token over all processes; not finite where `skipped` says so.
        auxiliary_loss: mean over the forward passes, see `SummedLoss`; None without one.
        grad_norm: of the whole gradient, before clipping.
        skipped: why nothing was updated; None for a step that was done.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    skipped: str | None = None
    auxiliary_loss: float | None = None


def run_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    windows: list[PackedWindow],
    windows_per_device: int,
    max_grad_norm: float,
    sequence: int = 1,
) -> StepResult:
    """Forward, backward, clip and update with this process's share of the step's windows.

    The host waits for the device once, after the backward pass. A loss or gradient that is not finite on any process
    updates nothing on all of them; `StepResult.skipped` then says what it was.

    Args:
        sequence: how many processes share each window.
    """
    device = accelerator.device
    targets, scale = _targets_and_scale(accelerator, sum(window.num_targets for window in windows), sequence)
    summed = torch.zeros(2, dtype=torch.float32, device=device)
    objective: Any = accelerator.unwrap_model(model)
    batches = [windows[i : i + windows_per_device] for i in range(0, len(windows), windows_per_device)]
    for number, batch in enumerate(batches):
        inputs = _model_inputs(batch, device)
        last = number == len(batches) - 1
        with torch.enable_grad(), nullcontext() if last else accelerator.no_sync(model):
            loss = model(**inputs)
            accelerator.backward(loss * scale)
        summed += objective.parts
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.as_tensor(accelerator.clip_grad_norm_(parameters, max_grad_norm))
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device, torch.float32)
    # The norm is the same on all processes, but were it not, some would update and some would not: the flag is summed.
    sums = accelerator.reduce(torch.cat([summed, (~norm.isfinite()).float()[None]]), "sum")
    counted = [targets[None]] if isinstance(targets, Tensor) else []
    loss_sum, auxiliary_sum, num_bad, grad_norm, *counts = torch.cat([sums, norm[None], *counted]).tolist()
    num_targets = int(counts[0]) if counts else int(targets)
    mean_loss = loss_sum / num_targets
    skipped = _not_finite(mean_loss, grad_norm, num_bad)
    if skipped is None:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    auxiliary_loss = auxiliary_sum / num_targets if objective.has_auxiliary_loss else None
    return StepResult(mean_loss, grad_norm, num_targets, skipped, auxiliary_loss)


def _targets_and_scale(accelerator: Accelerator, own: int, sequence: int) -> tuple[Tensor | int, Tensor | float]:
    """Target tokens of all processes, at least 1, and what a sum of losses is multiplied by.

    Several processes count together without waiting for each other: both are tensors on the device then.
    """
    if accelerator.num_processes == 1:
        return max(own, 1), 1 / max(own, 1)
    counts = torch.tensor(own, dtype=torch.float64, device=accelerator.device)
    total = (accelerator.reduce(counts, "sum") / sequence).round().clamp(min=1)
    return total, (accelerator.num_processes / total).float()


def _not_finite(mean_loss: float, grad_norm: float, num_bad: float) -> str | None:
    if math.isfinite(mean_loss) and math.isfinite(grad_norm) and not num_bad:
        return None
    return f"loss {mean_loss}, gradient norm {grad_norm}"


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
