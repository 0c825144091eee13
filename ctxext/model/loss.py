"""Next-token loss from hidden states, without ever holding the logits of a whole window.

At 131,072 tokens and a vocabulary of 128,256 the float32 logits alone are 63 GiB. Per-token losses are float32 and are
summed in float32. PyTorch's own `linear_cross_entropy` in chunks (2.13, `options=`) is not used: with bfloat16 inputs
its sum is a bfloat16 scalar (2896 for 2894.86), and it knows neither soft caps nor adapters on the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule

from ctxext.model.logits import UNCHANGED, LogitChange, logit_change
from ctxext.model.tiling import autocast_as_now, tiled

IGNORE_INDEX = -100
_CHUNK_TOKENS = 1024
# Up to here all logits at once are as good (256 MiB in float32).
_WHOLE_LOGITS = 2**26


class DecoderHead:
    """The two halves of a causal LM: decoder and output embedding, and what the model does to its logits.

    Raises:
        UnsupportedModelError: a model whose logits cannot be computed from these.
    """

    def __init__(self, model: Any) -> None:
        decoder = model.get_decoder()
        # Llama4ForCausalLM looks for the multimodal model's parts, and finds itself.
        self.decoder = model.model if decoder is model else decoder
        self.head = model.get_output_embeddings()
        self.change = logit_change(model.config)

    def hidden_states(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        """Last hidden states [B, S, D]."""
        hidden: Tensor = self.decoder(input_ids=input_ids, **arguments).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits [..., V] of hidden states [..., D], float32."""
        return self.change(_raw_logits(self.head, hidden).float())

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`token_losses` of this head."""
        return token_losses(hidden, self.head, targets, self.change)

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`summed_loss` of this head."""
        return summed_loss(hidden, self.head, targets, self.change)


def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor, change: LogitChange = UNCHANGED) -> Tensor:
    """Cross entropy per position, float32.

    Args:
        hidden: [N, D] hidden states.
        head: output embedding, to V words.
        targets: [N] token ids; `IGNORE_INDEX` gives a loss of exactly 0.
        change: of the logits.

    Returns:
        [N] float32.
    """
    if not torch.is_grad_enabled():
        # Without gradients plain chunks are as small and twice as fast (12,288 tokens x 49,152 words, two CPU cores:
        # 5.8 s against 11.3 s).
        pieces = range(0, max(len(targets), 1), _CHUNK_TOKENS)  # one empty piece for no targets
        return torch.cat(
            [_chunk_losses(hidden[i : i + _CHUNK_TOKENS], head, targets[i : i + _CHUNK_TOKENS], change) for i in pieces]
        )
    if len(targets) * _num_words(head) <= _WHOLE_LOGITS:
        return _chunk_losses(hidden, head, targets, change)
    return tiled(_chunk_losses, _CHUNK_TOKENS, hidden, head, targets, change, parameters=_trained(head))


def summed_loss(hidden: Tensor, head: nn.Module, targets: Tensor, change: LogitChange = UNCHANGED) -> Tensor:
    """The sum of `token_losses`, float32, whose gradients are made chunk by chunk on the way forward.

    The gradient of a sum of cross entropies is known with the logits (softmax minus one), so that they need not be
    computed twice, as in Liger's fused loss (Hsu et al. 2024, arXiv:2410.10989). The backward pass only scales.
    """
    whole = hidden.dtype == torch.float32 and len(targets) * _num_words(head) <= _WHOLE_LOGITS
    # A head that FSDP2 shards by itself gathers and frees its weights around the real backward pass.
    if not torch.is_grad_enabled() or whole or isinstance(head, FSDPModule):
        return token_losses(hidden, head, targets, change).sum()
    total: Tensor = _SummedLoss.apply(hidden, head, targets, change, *_trained(head))  # type: ignore[no-untyped-call]
    return total


def _chunk_losses(hidden: Tensor, head: nn.Module, targets: Tensor, change: LogitChange) -> Tensor:
    logits = change(_raw_logits(head, hidden).float())  # on the head's device, where a model is spread over several
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none", ignore_index=IGNORE_INDEX)


def _raw_logits(head: nn.Module, hidden: Tensor) -> Tensor:
    # Some models keep the head in float32 beside a bfloat16 decoder, and so does training it.
    weight: Any = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype != hidden.dtype:
        hidden = hidden.to(weight.dtype)
    logits: Tensor = head(hidden)
    return logits


def _num_words(head: Any) -> int:
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


def _trained(head: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


class _SummedLoss(torch.autograd.Function):
    """Forward: each chunk's loss and gradients, added up; backward: times what comes from above."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor, change: LogitChange, *parameters: nn.Parameter
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # In float32, or a sum over many chunks would round in bfloat16 again and again.
        of_parameters = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        precision = autocast_as_now(hidden.device.type)
        for start in range(0, len(targets), _CHUNK_TOKENS):
            piece = hidden[start : start + _CHUNK_TOKENS].detach().requires_grad_(of_hidden is not None)
            with torch.enable_grad(), precision():
                logits = _raw_logits(head, piece)
            summed, of_logits = _loss_and_gradient(logits.detach(), targets[start : start + _CHUNK_TOKENS], change)
            total += summed.to(total.device)
            leaves = [*([piece] if of_hidden is not None else []), *parameters]
            found = list(torch.autograd.grad(logits, leaves, of_logits)) if leaves else []
            del logits, of_logits
            if of_hidden is not None:
                of_hidden[start : start + _CHUNK_TOKENS] = found.pop(0)
            for collected, part in zip(of_parameters, found, strict=True):
                collected += part
        ctx.gradients, ctx.dtypes = (of_hidden, of_parameters), [parameter.dtype for parameter in parameters]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_parameters = ctx.gradients
        del ctx.gradients  # scaled in place, so that a second backward pass would be wrong: it fails
        if of_hidden is not None:
            of_hidden.mul_(gradient)
        scaled = [
            part.mul_(gradient.to(part.device)).to(dtype) for part, dtype in zip(of_parameters, ctx.dtypes, strict=True)
        ]
        return of_hidden, None, None, None, *scaled


def _loss_and_gradient(logits: Tensor, targets: Tensor, change: LogitChange) -> tuple[Tensor, Tensor]:
    """Sum of the losses, float32, and its gradient [N, V] by `logits`, which are overwritten where they can be."""
    targets = targets.to(logits.device)
    counted = targets != IGNORE_INDEX
    rows = torch.where(counted, targets, 0)[:, None]
    values = change(logits.float())
    slope = change.slope(values)
    # Softmax in one buffer: of [N, V] values there is nothing to spare. No head keeps its logits for its backward pass;
    # one that did would make autograd raise.
    values.sub_(values.amax(dim=-1, keepdim=True))
    of_target = values.gather(1, rows)
    sums = values.exp_().sum(dim=-1, keepdim=True)
    total = (sums.log() - of_target)[:, 0].masked_fill(~counted, 0.0).sum()
    gradient = values.div_(sums)
    gradient.scatter_add_(1, rows, gradient.new_full(rows.shape, -1.0))
    gradient.masked_fill_(~counted[:, None], 0.0)
    if isinstance(slope, Tensor) or slope != 1.0:
        gradient.mul_(slope)
    if gradient.shape != logits.shape:
        gradient = F.pad(gradient, (0, logits.shape[-1] - gradient.shape[-1]))
    return total, gradient.to(logits.dtype)
