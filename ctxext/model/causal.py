"""Causal attention of the last queries to cached keys, without a mask.

PyTorch's `is_causal` aligns queries with the first keys, so a chunk of a prefill, whose queries are the last ones, gets
a [Q, K] mask from transformers, which a CPU keeps as floats for every layer, and repeated key heads. Here the chunk's
queries meet the cached keys (all visible) and the chunk's own keys (causal) in two calls of the flash kernel, and the
two results are joined by their log-sum-exps: the same attention, rounded differently (3e-7), 20% faster on one core
(1024 queries, 2048 to 16384 keys, 9 heads of 64), with no memory but the results.

Registered as `ctxext_chunked`, with the marker masks of `ctxext.model.windowed`; whatever is not this case is computed
there, sliding windows too, or refused there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ctxext.model.documents import DOCUMENTS
from ctxext.model.windowed import WINDOWED, windowed_attention, windowed_mask
from ctxext.rope.families import text_config

CHUNKED = "ctxext_chunked"

# What model code passes along that changes nothing about the scores; with anything else `windowed_attention` decides.
_HARMLESS = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "sliding_window",
    "use_cache",
}


def lower_right_causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention where the last query sees all keys, the one before it all but one, and so on. CPU, no gradients.

    Args:
        query: [B, H, Q, D].
        key: [B, H_kv, K, D] with K >= Q; query heads share key heads in order.
        value: [B, H_kv, K, D].

    Returns:
        [B, H, Q, D].
    """
    flash: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    past = key.shape[2] - query.shape[2]
    own, own_weight = flash(query, key[:, :, past:], value[:, :, past:], 0.0, True, scale=scale)
    if past == 0:
        return own
    earlier, earlier_weight = flash(query, key[:, :, :past], value[:, :, :past], 0.0, False, scale=scale)
    share = torch.sigmoid(earlier_weight - own_weight).unsqueeze(-1)
    return torch.lerp(own, earlier, share.to(own.dtype))


def chunked_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """`windowed_attention`, with chunks of a prefill in full-attention layers joined from two flash kernels."""
    marked = attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and attention_mask.dtype == torch.long
    plain = (
        marked
        and int(attention_mask) == 0  # type: ignore[arg-type]
        and is_causal is not False
        and dropout == 0.0
        and query.shape[-1] == value.shape[-1]
        and all(value is None for name, value in arguments.items() if name not in _HARMLESS)
    )
    by_parts = query.device.type == "cpu" and 1 < query.shape[2] < key.shape[2] and not torch.is_grad_enabled()
    if plain and by_parts:
        return lower_right_causal(query, key, value, scaling).transpose(1, 2).contiguous(), None
    return windowed_attention(module, query, key, value, attention_mask, dropout, scaling, is_causal, **arguments)


def supports_chunked(model: Any) -> bool:
    """Whether `using_chunked` computes this model: on a CPU, with `sdpa` or one of our own, plain causal layers."""
    text = text_config(model.config)
    if getattr(text, "attn_logit_softcapping", None) is not None or model.device.type != "cpu":
        return False
    if getattr(text, "use_bidirectional_attention", False) or not getattr(text, "is_causal", True):
        return False
    # Others read the name of the attention themselves, and would fall back to one that adds the marker to the scores.
    if not getattr(model, "_supports_attention_backend", False):
        return False
    now = getattr(text, "_attn_implementation", None)
    if now in (WINDOWED, DOCUMENTS):
        return True
    sliding = getattr(text, "sliding_window", None) is not None
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    return now == "sdpa" and not sliding and layer_types == {"full_attention"}


@contextmanager
def using_chunked(model: Any) -> Iterator[None]:
    """Run `model` on `ctxext_chunked` inside the block."""
    text = text_config(model.config)
    before = text._attn_implementation
    text._attn_implementation = CHUNKED
    try:
        yield
    finally:
        text._attn_implementation = before


AttentionInterface.register(CHUNKED, chunked_attention)
AttentionMaskInterface.register(CHUNKED, windowed_mask)
