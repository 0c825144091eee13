"""Exact attention for windows of isolated documents and for sliding windows, without a mask of [S, S].

Where position ids begin anew, transformers isolates the documents of a window with a boolean mask of all queries by all
keys: 17 GB at 131,072 tokens, and no flash kernel takes it. Here documents travel as cumulative lengths. A CUDA device
runs one variable-length flash kernel over all of them (PyTorch's own, the layer's sliding window included); elsewhere,
and in float32, every document is one call of the causal kernel, or of `ctxext.model.windowed` in sliding layers.

Both halves are registered under the name `ctxext_documents`: the function that transformers asks for a mask finds the
documents in it and hands them on, and the attention function computes them. Nothing has to pass through the arguments
of a model's layers, which some families drop. A window of one document is `ctxext_windowed`, caches included. What
changes the scores (sinks, soft-capping, position biases) is refused, never approximated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ctxext.errors import UnsupportedModelError
from ctxext.model.windowed import (
    attend_to_window,
    of_one_width,
    refuse_changed_scores,
    windowed_attention,
    windowed_mask,
)

DOCUMENTS = "ctxext_documents"

# What PyTorch's FlashAttention-2 computes.
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_HEAD_DIM = 256


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, in place of a mask.

    Attributes:
        rows: lengths of the documents, row by row.
        cumulative: [N + 1] int32 on the model's device: where each document begins in the rows laid end to end.
        longest: tokens.
        window: the layer's sliding window; 0 where there is none.
    """

    rows: tuple[tuple[int, ...], ...]
    cumulative: Tensor
    longest: int
    window: int


def documents_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **unused: Any,
) -> Tensor | Documents:
    """What transformers asks for instead of a mask: `Documents`, or `windowed_mask` where nothing is packed.

    Args:
        mask_function: tells for indices (batch, head, query, key) what is visible; a document begins where a token does
            not see the one before it.

    Raises:
        UnsupportedModelError: another mask would be needed.
    """
    device, window = torch.device(device), local_size or 0
    if allow_is_causal_skip or mask_function is None or attention_mask is not None or q_length != kv_length:
        given = (q_offset, kv_offset, mask_function, attention_mask, local_size, allow_is_causal_skip)
        marker = windowed_mask(batch_size, q_length, kv_length, *given)
        if device.type == "cuda" and 0 < window < q_length == kv_length:  # one kernel for what would be blocks
            return documents_of(torch.zeros((batch_size, q_length - 1), dtype=torch.bool, device=device), window)
        return marker
    if window == 1:
        raise _refusal("documents in a sliding window of one token")
    rows = torch.arange(batch_size, device=device)[:, None]
    tokens = torch.arange(1, q_length, device=device)[None]
    head = torch.zeros((1, 1), dtype=torch.long, device=device)
    seen = mask_function(rows, head, tokens, tokens - 1).expand(batch_size, -1)
    _require_plain(mask_function, seen, window)
    return documents_of(~seen, window)


def documents_of(begins: Tensor, window: int = 0) -> Documents:
    """Documents from where they begin.

    Args:
        begins: [B, S - 1] whether a document begins at a row's second, third ... token.
    """
    length = begins.shape[1] + 1
    rows = []
    for row in begins.cpu():
        starts = [0, *(row.nonzero().flatten() + 1).tolist(), length]
        rows.append(tuple(end - start for start, end in pairwise(starts)))
    lengths = torch.tensor([0, *(size for row in rows for size in row)])
    cumulative = lengths.cumsum(0).to(device=begins.device, dtype=torch.int32)
    return Documents(tuple(rows), cumulative, int(lengths.max()), window)


def cumulative_arguments(documents: Documents) -> dict[str, Any]:
    """The same for transformers' `flash_attention_2` and its like, which take it as arguments of a model's forward."""
    return {
        "cu_seq_lens_q": documents.cumulative,
        "cu_seq_lens_k": documents.cumulative,
        "max_length_q": documents.longest,
        "max_length_k": documents.longest,
    }


def documents_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Documents | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, in the layer's sliding window.

    Args:
        query: [B, H, S, D].
        key: [B, H_kv, S, D]; query heads share key heads in order.
        value: [B, H_kv, S, D_v].
        attention_mask: what `documents_mask` returned.

    Returns:
        [B, S, H, D_v], and None for the weights.

    Raises:
        UnsupportedModelError: the call asks for what this function does not compute.
    """
    if not isinstance(attention_mask, Documents):
        return windowed_attention(module, query, key, value, attention_mask, dropout, scaling, is_causal, **arguments)
    documents = attention_mask
    refuse_changed_scores(is_causal, arguments)
    if _runs_varlen(query, value, dropout):
        return _varlen(query, key, value, documents, scaling), None
    rows = []
    for number, lengths in enumerate(documents.rows):
        row = slice(number, number + 1)
        parts = zip(*(tensor[row].split(list(lengths), dim=2) for tensor in (query, key, value)), strict=True)
        rows.append(torch.cat([attend_to_window(q, k, v, documents.window, dropout, scaling) for q, k, v in parts], 2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None) -> Tensor:
    """All documents of all rows in one kernel, which shares key heads itself."""
    from torch.nn.attention import varlen

    attend: Callable[..., Any] = varlen.varlen_attn
    width = value.shape[-1]
    query, key, value, scaling = of_one_width(query, key, value, scaling)
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    # Of a window of W tokens, W - 1 lie to the left of the query's own.
    window = (documents.window - 1, 0) if documents.window else (-1, 0)
    places, longest = documents.cumulative, documents.longest
    out = attend(
        *flat,
        places,
        places,
        longest,
        longest,
        scale=scaling,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    rows: Tensor = out[..., :width].unflatten(0, (query.shape[0], -1))
    return rows


@cache
def has_varlen() -> bool:
    """Whether this PyTorch has variable-length attention with sliding windows and shared key heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)


def _runs_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    return (
        query.device.type == "cuda"
        and torch.version.hip is None
        and has_varlen()
        and dropout == 0.0
        and query.dtype in _FLASH_DTYPES
        and max(query.shape[-1], value.shape[-1]) <= _FLASH_HEAD_DIM
    )


def _require_plain(mask_function: Callable[..., Tensor], seen: Tensor, window: int) -> None:
    """Refuse a mask that hides or shows more than documents and a window do: seen in every row's last two queries."""
    batch_size, length = seen.shape[0], seen.shape[1] + 1
    device = seen.device
    rows = torch.arange(batch_size, device=device)[:, None, None]
    queries = torch.arange(max(length - 2, 0), length, device=device)[None, :, None]
    keys = torch.arange(length, device=device)[None, None]
    head = torch.zeros((1, 1, 1), dtype=torch.long, device=device)
    number = torch.nn.functional.pad((~seen).long().cumsum(-1), (1, 0))  # of each token's document in its row
    expected = (number[:, queries[0, :, 0], None] == number[:, None]) & (keys <= queries)
    if window:
        expected = expected & (keys > queries - window)
    if not torch.equal(mask_function(rows, head, queries, keys).expand_as(expected), expected):
        raise _refusal("a mask that is not made of documents and sliding windows")


def _refusal(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"attention inside documents does not compute {what}", where=f"attention '{DOCUMENTS}'"
    )


# Compiled layers break their graph here: the lengths differ from window to window.
AttentionInterface.register(DOCUMENTS, torch.compiler.disable(documents_attention))
AttentionMaskInterface.register(DOCUMENTS, documents_mask)
