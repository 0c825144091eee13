"""Next-token loss from hidden states, without ever holding the logits of a whole window.

At 131,072 tokens and a vocabulary of 128,256 the float32 logits alone are 63 GiB. Per-token losses are float32 and are
summed in float32 by the caller: with bf16 inputs a fused mean is a bf16 scalar, 0.16% off.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from ctxext.errors import UnsupportedModelError
from ctxext.model.tiling import tiled

IGNORE_INDEX = -100
_CHUNK_TOKENS = 1024
# Up to here all logits at once are as good (256 MiB in float32). Without its `options`, torch's linear_cross_entropy is
# only a name for that.
_WHOLE_LOGITS = 2**26


class DecoderHead:
    """The two halves of a causal LM: decoder and output embedding.

    Raises:
        UnsupportedModelError: a head with logit soft-capping or scaling, which this loss would silently leave out.
    """

    def __init__(self, model: Any) -> None:
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        config = model.config.get_text_config()
        for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            value = getattr(config, key, None)
            if value not in (None, 1, 1.0):
                raise UnsupportedModelError(
                    "the model changes its logits in a way that the loss would leave out",
                    where=f"config.{key}",
                    got=value,
                )

    def hidden_states(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        """Last hidden states [B, S, D]."""
        hidden: Tensor = self.decoder(input_ids=input_ids, **arguments).last_hidden_state
        return hidden


def token_losses(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    """Cross entropy per position, float32.

    Args:
        hidden: [N, D] hidden states.
        head: output embedding with weight [V, D].
        targets: [N] token ids; `IGNORE_INDEX` gives a loss of exactly 0.

    Returns:
        [N] float32.
    """
    if not torch.is_grad_enabled():
        # Without gradients plain chunks are as small and twice as fast (12,288 tokens x 49,152 words, two CPU cores:
        # 5.8 s against 11.3 s).
        pieces = range(0, max(len(targets), 1), _CHUNK_TOKENS)  # one empty piece for no targets
        return torch.cat(
            [_chunk_losses(hidden[i : i + _CHUNK_TOKENS], head, targets[i : i + _CHUNK_TOKENS]) for i in pieces]
        )
    if len(targets) * head.weight.shape[0] <= _WHOLE_LOGITS and head.bias is None:
        fused = getattr(F, "linear_cross_entropy", None)
        if fused is not None:
            losses: Tensor = fused(hidden, head.weight, targets, reduction="none", ignore_index=IGNORE_INDEX)
            return losses.float()
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return tiled(_chunk_losses, _CHUNK_TOKENS, hidden, head, targets, parameters=parameters)


def _chunk_losses(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    logits = head(hidden).float()  # on the head's device, where a model is spread over several
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none", ignore_index=IGNORE_INDEX)
