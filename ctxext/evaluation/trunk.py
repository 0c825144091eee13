"""Prompts that begin alike: in which order to answer them, and what of the cache each can keep.

Found by comparing token ids alone, so no task needs to know of it. Visited in the order of a prefix tree, every prompt
keeps the tokens that it shares with the one before; together they prefill each edge of the tree once, which no order
can beat. A haystack with its needle at rising depths is the common case: the trunk grows, each prompt branches off.

Sharing is exact where a token's key depends on nothing but the tokens before it. It does not where the RoPE frequencies
depend on how much text there is: `reason_against_sharing` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ctxext.model.cache import RewindableCache
from ctxext.rope.families import rope_groups, text_config


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(np.asarray(first[:length]) != np.asarray(second[:length]))
    return int(differing[0]) if len(differing) else length


def visiting_order(prompts: Sequence[list[int]]) -> list[int]:
    """Indices of the prompts in an order of their prefix tree, small branches before large ones.

    So prompts that leave the trunk early come first (depths ascending), and a return is always to the last fork.
    """
    ranked = sorted(range(len(prompts)), key=lambda number: prompts[number])
    alike = [common_prefix(prompts[a], prompts[b]) for a, b in pairwise(ranked)]
    order: list[int] = []
    waiting = [(0, len(ranked))]
    while waiting:
        low, high = waiting.pop()
        if high - low <= 1:
            order += ranked[low:high]
            continue
        fork = min(alike[low : high - 1])
        cuts = [low, *(place + 1 for place in range(low, high - 1) if alike[place] == fork), high]
        # Small branches first; among equal ones the first asked. The last pushed is the first visited.
        branches = sorted(pairwise(cuts), key=lambda part: (part[1] - part[0], min(ranked[part[0] : part[1]])))
        waiting += reversed(branches)
    return order


def kept_lengths(prompts: Sequence[list[int]]) -> list[int]:
    """Tokens of the cache that each prompt keeps from the one before it, in the order given.

    One less than both begin with: that token is run again, since its hidden state predicts where they part.
    """
    return [0, *(max(common_prefix(a, b) - 1, 0) for a, b in pairwise(prompts))]


def lengths_to_remember(kept: Sequence[int], place: int) -> list[int]:
    """Lengths that later prompts return to and that the prompt at `place` is the last to pass before."""
    lengths: list[int] = []
    for length in kept[place + 1 :]:
        if not lengths or length < lengths[-1]:
            lengths.append(length)
        if length <= kept[place]:
            break
    return sorted(length for length in lengths if length > kept[place])


def num_shared_tokens(prompts: Sequence[list[int]]) -> int:
    """Tokens that need no prefill of their own when the prompts are visited in `visiting_order`."""
    ordered = [prompts[number] for number in visiting_order(prompts)]
    return sum(kept_lengths(ordered))


def reason_against_sharing(config: Any, longest_tokens: int) -> str | None:
    """Why prompts of a model must not share a beginning; None when they may.

    Args:
        longest_tokens: of the longest prompt with its answer.
    """
    if frequencies_grow(config):
        return "dynamic RoPE: a prompt's length decides the frequencies of all its tokens"
    switch = switching_length(config)
    if switch is not None and longest_tokens > switch:
        return f"longrope with two ranges: beyond {switch} tokens all tokens have other frequencies"
    return RewindableCache(config, 1).obstacle


def frequencies_grow(config: Any) -> bool:
    """Whether the RoPE frequencies depend on the length of the text (`dynamic`)."""
    return any("dynamic" in str(parameters.get("rope_type", "")) for parameters in _rope_parameters(config))


def switching_length(config: Any) -> int | None:
    """Tokens beyond which a two-range `longrope` takes its other frequencies; None without one."""
    text = text_config(config)
    lengths = [
        parameters.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for parameters in _rope_parameters(config)
        if parameters.get("rope_type") == "longrope" and parameters.get("short_factor") != parameters.get("long_factor")
    ]
    return min(lengths, default=None)


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Every RoPE of a config: one, or one a layer type; none without rotary positions."""
    return list(rope_groups(config).values()) if getattr(text_config(config), "rope_parameters", None) else []
