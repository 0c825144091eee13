"""Exact attention for models that mix sliding-window and full layers, without a [S, S] mask.

PyTorch has no sliding-window kernel on the CPU, so transformers' `sdpa` gives such layers a boolean mask of all queries
by all keys and computes every score in it: 1.6 GB and 80 times the needed scores at 40,960 tokens with a window of 512.
Here the queries of a sliding layer go in blocks, each with the keys that its window reaches and one small mask that all
blocks share; full layers run the causal kernel.

Both halves are registered under the name `ctxext_windowed`, the attention function and the function that makes its
masks. The mask carries nothing but the layer's window, so the two cannot disagree about it. Whatever needs a real mask
(padding, packed documents, static caches) and whatever changes the scores (sinks, soft-capping, position biases) is
refused, never approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ctxext.errors import UnsupportedModelError
from ctxext.model.load import plain_attention
from ctxext.rope.families import text_config

WINDOWED = "ctxext_windowed"

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# What a caller can pass to an attention function that changes its result and that this one does not compute.
_REFUSED = {
    "cache": "a paged cache",
    "cu_seq_lens_q": "packed documents",
    "position_bias": "a position bias",
    "s_aux": "attention sinks",
    "softcap": "soft-capping of the scores",
}
# Queries a block, as a share of the window: every query costs 1.25 windows of keys instead of 2 with blocks of a whole
# window (one core, 4096 tokens, window 512: 0.14 s against 0.22 s); below 64 queries the matrix products get too small.
_BLOCKS_PER_WINDOW = 4
_SMALLEST_BLOCK = 64
# Queries of a full layer with earlier keys in a cache need a mask; so many of its elements exist at a time.
_MASK_ELEMENTS = 1 << 25


def supports_windowed(config: Any) -> bool:
    """Whether a model of this config has sliding-window layers that `WINDOWED` computes.

    False for a model without them, which gains nothing, and for one whose layers are of another kind or change the
    scores. Sinks do not show in a config: a model that has them raises `UnsupportedModelError` when it runs.
    """
    text = text_config(config)
    if getattr(text, "sliding_window", None) is None or getattr(text, "attn_logit_softcapping", None) is not None:
        return False
    if getattr(text, "use_bidirectional_attention", False) or not getattr(text, "is_causal", True):
        return False
    layer_types = getattr(text, "layer_types", None) or ["sliding_attention"]
    return "sliding_attention" in layer_types and set(layer_types) <= _LAYER_TYPES


def attention_for(config: Any, device: torch.device) -> str:
    """The attention to load a model with for long prompts: `WINDOWED` on a CPU where it applies, else the plain one."""
    plain = plain_attention(config)
    return WINDOWED if plain == "sdpa" and device.type == "cpu" and supports_windowed(config) else plain


def windowed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **unused: Any,
) -> Tensor:
    """The layer's window as a tensor [1, 1, 1, 1] (0: none), in place of a mask.

    Args:
        mask_function: tells for indices (batch, head, query, key) what is visible; asked, so that nothing but a causal
            mask with a window of `local_size` passes.
        attention_mask: True for tokens, False for padding, [B, at least S].

    Raises:
        UnsupportedModelError: another mask would be needed.
    """
    if not allow_is_causal_skip or mask_function is None or (local_size is not None and local_size < 1):
        raise _refusal("a mask that is not plainly causal (packed documents, images, a static cache)")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise _refusal("padding")
    first, end = int(q_offset), int(kv_offset) + kv_length
    if first + q_length != end:
        raise _refusal("keys behind the last query (a static cache)")
    # Two neighbouring rows: chunked attention looks like a window only in the last row of a chunk.
    rows = torch.arange(max(end - 2, first), end)[:, None]
    columns = torch.arange(int(kv_offset), end)[None]
    expected = columns <= rows
    if local_size is not None:
        expected = expected & (columns > rows - local_size)
    zero = torch.zeros((1, 1), dtype=torch.long)
    if not torch.equal(mask_function(zero, zero, rows, columns).expand_as(expected), expected):
        raise _refusal("a mask that is neither causal nor a sliding window")
    return torch.full((1, 1, 1, 1), local_size or 0)


def windowed_attention(
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
    """Attention of the last queries to all keys, causal, in the window that `windowed_mask` gave.

    Args:
        query: [B, H, Q, D].
        key: [B, H_kv, K, D] with K >= Q: cached keys, then those of the queries.
        value: [B, H_kv, K, D_v].
        attention_mask: what `windowed_mask` returned.

    Returns:
        [B, Q, H, D_v], and None for the weights.

    Raises:
        UnsupportedModelError: the call asks for what this function does not compute.
    """
    refuse_changed_scores(is_causal, arguments)
    if attention_mask is None or attention_mask.shape != (1, 1, 1, 1) or attention_mask.dtype != torch.long:
        raise _refusal("a mask that the model makes itself")
    out = attend_to_window(query, key, value, int(attention_mask), dropout, scaling)
    return out.transpose(1, 2).contiguous(), None


def refuse_changed_scores(is_causal: bool | None, arguments: Mapping[str, Any]) -> None:
    """Refuse a call that asks for other scores than causal ones.

    Raises:
        UnsupportedModelError: it does.
    """
    for name, what in _REFUSED.items():
        if arguments.get(name) is not None:
            raise _refusal(what)
    if is_causal is False:
        raise _refusal("attention in both directions")


def attend_to_window(
    query: Tensor, key: Tensor, value: Tensor, window: int, dropout: float, scaling: float | None
) -> Tensor:
    """Attention of the last queries to all keys, causal, in a window (0: none); [B, H, Q, D_v]."""
    attend = _Attend(dropout, scaling)
    if window == 0 or key.shape[2] <= window:
        return _causal(query, key, value, attend)
    return _sliding(query, key, value, window, attend)


class _Attend:
    """`scaled_dot_product_attention` with what stays the same for all blocks of a layer.

    On a CPU the flash kernel shares key heads among query heads with a mask too (traced on `meta`); elsewhere a mask
    needs them repeated.
    """

    def __init__(self, dropout: float, scaling: float | None) -> None:
        self._dropout = dropout
        self._scaling = scaling

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        width = value.shape[-1]
        if query.device.type in ("cpu", "meta"):
            query, key, value, scaling = of_one_width(query, key, value, self._scaling)
        else:
            scaling = self._scaling
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and mask is not None and query.device.type not in ("cpu", "meta"):
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self._dropout,
            is_causal=is_causal,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out[..., :width]


def of_one_width(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """Heads whose keys and values differ in width (multi-head latent attention), padded with zeros to the wider.

    Exact: zeros add nothing to a score, and the output's further columns are zero. Kernels want one width, and compute
    all scores otherwise.
    """
    difference = query.shape[-1] - value.shape[-1]
    if difference > 0:
        return query, key, F.pad(value, (0, difference)), scaling
    if difference < 0:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return F.pad(query, (0, -difference)), F.pad(key, (0, -difference)), value, scaling
    return query, key, value, scaling


def _causal(query: Tensor, key: Tensor, value: Tensor, attend: _Attend) -> Tensor:
    """Every query sees all keys up to its own; the last query sees all."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == num_keys:
        return attend(query, key, value, is_causal=True)
    if num_queries == 1:
        return attend(query, key, value)
    pieces = []
    rows = max(_MASK_ELEMENTS // num_keys, 1)
    columns = torch.arange(num_keys, device=query.device)
    for start in range(0, num_queries, rows):
        piece = query[:, :, start : start + rows]
        end = num_keys - num_queries + start + piece.shape[2]
        last = torch.arange(end - piece.shape[2], end, device=query.device)
        mask = columns[None, :end] <= last[:, None]
        pieces.append(attend(piece, key[:, :, :end], value[:, :, :end], mask))
    return torch.cat(pieces, dim=2)


def _sliding(query: Tensor, key: Tensor, value: Tensor, window: int, attend: _Attend) -> Tensor:
    """Every query sees the last `window` keys up to its own."""
    num_queries = query.shape[2]
    reach = window - 1  # keys before a query's own
    key, value = key[:, :, -(num_queries + reach) :], value[:, :, -(num_queries + reach) :]
    past = key.shape[2] - num_queries
    # The first queries' windows begin before the first key: to them the window hides nothing.
    head = min(reach - past, num_queries)
    block = min(window, max(window // _BLOCKS_PER_WINDOW, _SMALLEST_BLOCK))
    body = (num_queries - head) // block * block
    tail = num_queries - head - body
    pieces = []
    if head:
        pieces.append(_causal(query[:, :, :head], key[:, :, : past + head], value[:, :, : past + head], attend))
    if body:
        # Past the head, the window of the first query begins with the first key.
        span = key[:, :, : reach + body], value[:, :, : reach + body]
        pieces.append(_blocks(query[:, :, head : head + body], *span, window, block, attend))
    if tail:
        span = key[:, :, -(reach + tail) :], value[:, :, -(reach + tail) :]
        pieces.append(attend(query[:, :, head + body :], *span, _band(tail, window, query.device)))
    return torch.cat(pieces, dim=2)


def _blocks(query: Tensor, key: Tensor, value: Tensor, window: int, block: int, attend: _Attend) -> Tensor:
    """Blocks of `block` queries [B, H, N * block, D], each with the window - 1 + block keys that its queries see.

    The blocks take the place of the batch. Their keys overlap and are views, so nothing is copied; that is why the rows
    of a batch go one by one.
    """
    mask = _band(block, window, query.device)
    num_keys = window - 1 + block
    rows = []
    for q, k, v in zip(query, key, value, strict=True):
        blocks = q.unflatten(1, (-1, block)).transpose(0, 1)  # [N, H, block, D]
        keys = k.unfold(1, num_keys, block).permute(1, 0, 3, 2)  # [N, H_kv, num_keys, D]
        values = v.unfold(1, num_keys, block).permute(1, 0, 3, 2)
        rows.append(attend(blocks, keys, values, mask).transpose(0, 1).flatten(1, 2))
    return torch.stack(rows)


def _band(num_queries: int, window: int, device: torch.device) -> Tensor | None:
    """Which of window - 1 + num_queries keys each query sees; None when it is all of them."""
    if num_queries == 1:
        return None
    ones = torch.ones((num_queries, window - 1 + num_queries), dtype=torch.bool, device=device)
    return ones.triu() & ones.tril(window - 1)


def _refusal(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"windowed attention does not compute {what}",
        where=f"attention '{WINDOWED}'",
        hint="Use the attention 'sdpa' here.",
    )


AttentionInterface.register(WINDOWED, windowed_attention)
AttentionMaskInterface.register(WINDOWED, windowed_mask)
