"""Which tokens a training has read so far, to tell a batch that is unlike all before."""

from __future__ import annotations

import base64
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxext.data.packing import PackedWindow
from ctxext.evaluation.sharding import this_launch

# An id is anomalous with this share of a batch, and so many times its share of everything before.
_LEAST_SHARE = 0.02
_TIMES = 10.0
_MOST_NAMED = 5
# Ids never seen before, all together: this share of a batch, and so many times what is usual.
_NEW_SHARE = 0.1
_NEW_TIMES = 5.0
_USUAL_STEPS = 64

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Anomaly:
    """A token that is far more common in a batch than before it; `usual` 0 means never seen."""

    token_id: int
    share: float
    usual: float

    def text(self) -> str:
        """'id 17 (12.0% of the batch, 0.1% before)'."""
        before = f"{self.usual:.2%} before" if self.usual else "never seen before"
        return f"id {self.token_id} ({self.share:.1%} of the batch, {before})"


class TokenCounts:
    """How often each id was read, by all processes together."""

    def __init__(self, vocabulary_size: int) -> None:
        self._total: Counts = np.zeros(vocabulary_size, dtype=np.int64)
        self._new_shares: deque[float] = deque(maxlen=_USUAL_STEPS)

    def count(self, windows: Sequence[PackedWindow]) -> Counts:
        """Counts of one step over all processes, which call this together."""
        ids = np.concatenate([np.asarray(window.input_ids, dtype=np.int64) for window in windows] or [np.empty(0, int)])
        found, numbers = np.unique(ids, return_counts=True)
        counts: Counts = np.zeros_like(self._total)
        for other_ids, other_numbers in this_launch().gathered((found, numbers)):
            counts[other_ids] += other_numbers
        return counts

    def anomalies(self, counts: Counts) -> list[Anomaly]:
        """The tokens of a step that are unlike all before; none without anything before."""
        before, now = int(self._total.sum()), int(counts.sum())
        if not before or not now:
            return []
        shares, usual = counts / now, self._total / before
        odd = (shares >= _LEAST_SHARE) & (shares > _TIMES * usual)
        new_share = self._new_share(counts)
        if new_share >= _NEW_SHARE and new_share > _NEW_TIMES * median(self._new_shares):
            odd |= (counts > 0) & (self._total == 0)
        found = np.flatnonzero(odd)
        ranked = sorted(found.tolist(), key=lambda token: -shares[token])
        return [Anomaly(token, float(shares[token]), float(usual[token])) for token in ranked[:_MOST_NAMED]]

    def add(self, counts: Counts) -> None:
        """These belong to what was before from now on."""
        self._new_shares.append(self._new_share(counts))
        self._total += counts

    def _new_share(self, counts: Counts) -> float:
        return float(counts[self._total == 0].sum()) / max(int(counts.sum()), 1)

    def state(self) -> dict[str, Any]:
        """The counts as text, and the last steps' shares of new ids."""
        packed = base64.b64encode(zlib.compress(self._total.astype("<i8").tobytes())).decode()
        return {"total": packed, "new_shares": list(self._new_shares)}

    def restore(self, state: dict[str, Any]) -> None:
        """The way back."""
        self._total = np.frombuffer(zlib.decompress(base64.b64decode(state["total"])), dtype="<i8").astype(np.int64)
        self._new_shares = deque(state["new_shares"], maxlen=_USUAL_STEPS)
