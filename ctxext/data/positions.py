"""Position ids of training windows; pure.

Skip-wise positions (PoSE, Zhu et al. 2023, arXiv:2309.10400): a short window is cut into chunks of consecutive
positions with gaps between them, so that short windows show the model every distance of the target range.
"""

from __future__ import annotations

import random


def consecutive_positions(length: int) -> list[int]:
    """0, 1, ... length - 1."""
    return list(range(length))


def skip_wise_positions(cuts: list[int], length: int, target_length: int, rng: random.Random) -> list[int]:
    """Positions of a window that is cut at `cuts`; all gaps together are uniform over [0, target_length - length].

    The first chunk begins at position 0, so the first token stays what it is at inference: the start of the text.

    Args:
        cuts: ascending token indices in (0, length) at which a new chunk begins.

    Raises:
        ValueError: cuts out of order, or a window longer than the target.
    """
    if length > target_length:
        raise ValueError(f"a window of {length} tokens does not fit into {target_length} positions")
    if any(not 0 < cut < length for cut in cuts) or sorted(set(cuts)) != cuts:
        raise ValueError(f"cuts {cuts} are not ascending inside a window of {length}")
    total_skip = rng.randint(0, target_length - length)
    # Uniform split of the total over the gaps: sorted uniform points, so that k gaps share it without order bias.
    points = sorted(rng.randint(0, total_skip) for _ in cuts[:-1])
    offsets = [*points, total_skip] if cuts else []
    positions = list(range(length))
    for cut, offset, end in zip(cuts, offsets, [*cuts[1:], length], strict=True):
        for index in range(cut, end):
            positions[index] = index + offset
    return positions
