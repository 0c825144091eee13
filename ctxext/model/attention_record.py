"""Attention weights of a few queries, taken while the model runs as it always does.

A kernel that is fast never shows its weights. Here a few rows of them are computed again from the queries and keys that
the kernel gets: [heads, rows, S] instead of [heads, S, S]. The kernel's own result is handed on untouched, so what is
computed, and what is trained, stays the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# What shifts single scores, where nothing here can follow.
_UNKNOWN = ("position_bias", "cache")


@dataclass(frozen=True)
class LayerRecord:
    """What the rows of one layer look at.

    Attributes:
        entropy: [heads] mean over the rows, in bits.
        uniform_bits: what it would be if every row looked at all that it can see alike.
        far: [heads, distances] mean share of the weight on keys farther away than each distance, of the rows that can
            see so far; NaN where none can.
    """

    entropy: Tensor
    uniform_bits: float
    far: Tensor


@dataclass
class AttentionRecord:
    """What is recorded of one forward pass.

    Attributes:
        positions: [S] position ids of the first row of the batch, the only one that is looked at.
        rows: indices of the queries.
        distances: in positions.
        layers: by the layer's number.
        unknown: layers whose weights cannot be told from queries and keys, with the reason.
    """

    positions: Tensor
    rows: Sequence[int]
    distances: Sequence[int]
    layers: dict[int, LayerRecord] = field(default_factory=dict)
    unknown: dict[int, str] = field(default_factory=dict)


@contextmanager
def recording(record: AttentionRecord) -> Iterator[None]:
    """Fill `record` from the first forward pass inside the block.

    Later passes, those that activation checkpoints repeat among them, leave it as it is.
    """
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    # Under their own names, so that whatever goes by the name (masks, checks) goes on as before.
    for name, function in list(ALL_ATTENTION_FUNCTIONS.items()):
        ALL_ATTENTION_FUNCTIONS[name] = partial(_recorded, record, function)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(before)


def _recorded(
    record: AttentionRecord,
    function: Callable[..., Any],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **arguments: Any,
) -> Any:
    layer = int(getattr(module, "layer_idx", None) or 0)
    if layer not in record.layers and layer not in record.unknown:
        reason = _reason_against(record, module, query, key, arguments)
        if reason is None:
            with torch.no_grad():
                record.layers[layer] = _look(record, query[0], key[0], attention_mask, arguments)
        else:
            record.unknown[layer] = reason
    return function(module, query, key, value, attention_mask, **arguments)


def _reason_against(
    record: AttentionRecord, module: torch.nn.Module, query: Tensor, key: Tensor, arguments: dict[str, Any]
) -> str | None:
    for name in _UNKNOWN:
        if arguments.get(name) is not None:
            return f"its scores depend on {name}"
    causal = arguments.get("is_causal")
    if (getattr(module, "is_causal", True) if causal is None else causal) is False:
        return "it looks in both directions"
    if not query.shape[-2] == key.shape[-2] == len(record.positions):
        return f"it has {query.shape[-2]:,} queries and {key.shape[-2]:,} keys, the window {len(record.positions):,}"
    return None


def _look(
    record: AttentionRecord,
    query: Tensor,
    key: Tensor,
    mask: Any,
    arguments: dict[str, Any],
) -> LayerRecord:
    """One layer's rows; `query` is [H, S, D], `key` [H_kv, S, D]."""
    rows = torch.as_tensor(record.rows, device=query.device)
    positions = record.positions.to(query.device)
    visible = _visible(rows, key.shape[1], mask, arguments)
    apart = positions[rows][:, None] - positions[None]  # [n, S]
    far = [visible & (apart > distance) for distance in record.distances]
    entropies: list[Tensor] = []
    shares: list[Tensor] = []
    # Head by head, or the float32 copy of all keys would be as large as a layer's activations.
    for queries, keys in zip(query[:, rows].unflatten(0, (key.shape[0], -1)), key, strict=True):
        sinks = arguments.get("s_aux")
        own_sinks = None if sinks is None else sinks.view(key.shape[0], -1)[len(entropies)]
        weights = _weights(queries.float(), keys.float(), visible, arguments, own_sinks)
        entropies.append(torch.special.entr(weights).sum(-1) / math.log(2.0))
        weights = weights[..., : key.shape[1]]
        shares.append(torch.stack([(weights * behind).sum(-1) for behind in far], dim=-1))
    reach = torch.stack([behind.any(-1) for behind in far], dim=-1)  # [n, distances]
    share = torch.cat(shares).masked_fill(~reach, float("nan")).nanmean(1)
    uniform = float(torch.log2(visible.sum(-1).float()).mean())
    return LayerRecord(torch.cat(entropies).mean(1).cpu(), uniform, share.cpu())


def _weights(query: Tensor, key: Tensor, visible: Tensor, arguments: dict[str, Any], sinks: Tensor | None) -> Tensor:
    """[G, n, S] weights of one key head's queries [G, n, D]; with sinks one more column, what goes into them."""
    scores = query @ key.T * (arguments.get("scaling") or key.shape[-1] ** -0.5)
    if (cap := arguments.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1)
    return torch.softmax(scores, dim=-1)


def _visible(rows: Tensor, num_keys: int, mask: Any, arguments: dict[str, Any]) -> Tensor:
    """[n, S] which keys each row sees, from everything that can say so."""
    columns = torch.arange(num_keys, device=rows.device)
    visible = columns[None] <= rows[:, None]
    window = arguments.get("sliding_window")
    if isinstance(mask, Tensor) and mask.shape == (1, 1, 1, 1) and mask.dtype == torch.long:
        window = int(mask) or None  # the marker of `model/windowed.py`
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        drawn = mask[0, 0, rows, :num_keys]
        visible = visible & (drawn if drawn.dtype == torch.bool else drawn >= 0)
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        visible = visible & mask[0, :num_keys].bool()
    elif (mask_mod := getattr(mask, "mask_mod", None)) is not None:
        zero = torch.zeros((), dtype=torch.long, device=rows.device)
        visible = visible & mask_mod(zero, zero, rows[:, None], columns[None])
    if window is not None:
        visible = visible & (columns[None] > rows[:, None] - window)
    starts = arguments.get("cu_seq_lens_q")
    if starts is not None:
        document = torch.bucketize(columns, starts[1:].to(rows.device), right=True)
        visible = visible & (document[None] == document[rows][:, None])
    return visible
