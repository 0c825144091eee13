"""Position ids of training windows; pure.

Skip-wise positions (PoSE, Zhu et al. 2023, arXiv:2309.10400): a short window is cut into chunks of consecutive
positions with gaps between them, so that short windows show the model every distance of the target range.
"""

from __future__ import annotations

import random
from itertools import pairwise


def consecutive_positions(length: int) -> list[int]:
    """0, 1, ... length - 1."""
    return list(range(length))


def restarting_positions(starts: list[int], length: int) -> list[int]:
    """From 0 at the window's start and at every one of `starts`, as documents that do not see each other have them."""
    borders = sorted({0, *starts})
    return [place for begin, end in pairwise([*borders, length]) for place in range(end - begin)]


def shifted_positions(length: int, target_length: int, rng: random.Random) -> list[int]:
    """Consecutive from a start that is uniform over all at which the window ends inside the target length.

    RoPE sees differences only, so this changes numbers by rounding alone; it is for models whose positions are not all
    relative, and for telling whether a model's are.

    Raises:
        ValueError: a window longer than the target.
    """
    if length > target_length:
        raise ValueError(f"a window of {length} tokens does not fit into {target_length} positions")
    start = rng.randint(0, target_length - length)
    return list(range(start, start + length))


def skip_wise_positions(
    cuts: list[int], length: int, target_length: int, rng: random.Random, *, to_the_end: bool = False
) -> list[int]:
    """Positions of a window that is cut at `cuts`; all gaps together are uniform over [0, target_length - length].

    The first chunk begins at position 0, so the first token stays what it is at inference: the start of the text.

    Args:
        cuts: ascending token indices in (0, length) at which a new chunk begins.
        to_the_end: the gaps always add up to all that is free, so the last token has the target's last position; with a
            single cut the whole gap is then the same in every window.

    Raises:
        ValueError: cuts out of order, or a window longer than the target.
    """
    if length > target_length:
        raise ValueError(f"a window of {length} tokens does not fit into {target_length} positions")
    if any(not 0 < cut < length for cut in cuts) or sorted(set(cuts)) != cuts:
        raise ValueError(f"cuts {cuts} are not ascending inside a window of {length}")
    free = target_length - length
    total_skip = free if to_the_end else rng.randint(0, free)
    # Uniform split of the total over the gaps: sorted uniform points, so that k gaps share it without order bias.
    points = sorted(rng.randint(0, total_skip) for _ in cuts[:-1])
    offsets = [*points, total_skip] if cuts else []
    positions = list(range(length))
    for cut, offset, end in zip(cuts, offsets, [*cuts[1:], length], strict=True):
        for index in range(cut, end):
            positions[index] = index + offset
    return positions
