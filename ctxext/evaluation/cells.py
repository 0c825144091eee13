"""What stands in a cell of a heatmap, for pictures and page alike: columns are lengths, rows what they are drawn over.

Rows are depths, absolute token positions of the needle (bins of equal width), or tasks. Pure.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ctxext.evaluation.arms import Arm, tasks_of
from ctxext.evaluation.statistics import MeanScore
from ctxext.evaluation.store import SampleResult, score_of

Over = Literal["depth", "position", "task"]
Place = float | str

_MAX_POSITION_ROWS = 16


@dataclass(frozen=True)
class CellCount:
    """Samples of a cell.

    Attributes:
        num_right: scored samples with a full score.
        num_missing: samples without a score; `reasons` says why, the most frequent first.
        score: mean of the scores with its interval; None when nothing is scored.
        all_or_nothing: whether every score is 0 or 1, so that counts say all.
    """

    num_right: int
    num_scored: int
    num_missing: int
    num_degenerate: int = 0
    score: MeanScore | None = None
    all_or_nothing: bool = True
    reasons: tuple[str, ...] = field(default=())

    @property
    def value(self) -> float:
        """What the colour shows: the mean score."""
        return self.score.value if self.score else self.num_right / max(self.num_scored, 1)

    def text(self) -> str:
        """'3/4' or '0.62', then what is missing and (after a dagger) how many answers are degenerate."""
        if self.num_scored == 0:
            return f"{self.reasons[0]}\n({self.num_missing})" if self.reasons else ""
        lines = [f"{self.num_right}/{self.num_scored}" if self.all_or_nothing else f"{self.value:.2f}"]
        if self.num_missing:
            lines.append(f"+{self.num_missing} missing")
        if self.num_degenerate:
            lines.append(f"†{self.num_degenerate}")
        return "\n".join(lines)

    def facts(self) -> str:
        """Everything in one line, for those who point at the cell."""
        if self.score is None:
            return f"no score: {self.num_missing} {', '.join(self.reasons)}" if self.num_missing else "not asked"
        parts = [f"{self.num_right} of {self.num_scored} right"]
        if not self.all_or_nothing:
            parts.append(f"mean score {self.score.value:.2f}")
        parts.append(f"95% interval {self.score.low:.2f} to {self.score.high:.2f}")
        parts.append(f"{self.score.num_clusters} independent {'text' if self.score.num_clusters == 1 else 'texts'}")
        if self.num_degenerate:
            parts.append(f"{self.num_degenerate} degenerate")
        if self.num_missing:
            parts.append(f"{self.num_missing} missing ({', '.join(self.reasons)})")
        return ", ".join(parts)


NOT_ASKED = CellCount(0, 0, 0)


def count(samples: Sequence[SampleResult]) -> CellCount:
    """The cell of these samples."""
    scored = [sample for sample in samples if sample.status == "ok"]
    reasons = Counter(sample.status.replace("_", " ") for sample in samples if sample.status != "ok")
    return CellCount(
        num_right=sum(sample.score >= 1.0 for sample in scored),
        num_scored=len(scored),
        num_missing=len(samples) - len(scored),
        num_degenerate=sum(sample.degenerate is not None for sample in scored),
        score=score_of(scored),
        all_or_nothing=all(sample.score in (0.0, 1.0) for sample in scored),
        reasons=tuple(reason for reason, _ in reasons.most_common()),
    )


def cell_counts(arm: Arm, over: Over = "depth", row_tokens: int = 1) -> dict[tuple[int, Place], CellCount]:
    """Cells by length and row: a depth, a task, or the first of `row_tokens` positions; other things are pooled."""
    groups: defaultdict[tuple[int, Place], list[SampleResult]] = defaultdict(list)
    for sample in arm.samples:
        place: Place = sample.task if over == "task" else sample.depth
        if over == "position":
            place = float(sample.needle_position // row_tokens * row_tokens)
        groups[sample.length_tokens, place].append(sample)
    return {place: count(members) for place, members in groups.items()}


def position_rows(longest: int) -> list[float]:
    """First positions of 8 to 16 rows of equal height, a power of two of tokens each, up to the longest length."""
    row_tokens = 2 ** max(0, math.ceil(math.log2(max(longest, 1) / _MAX_POSITION_ROWS)))
    return [float(start) for start in range(0, max(longest, 1), row_tokens)]


@dataclass(frozen=True)
class Frame:
    """The rows and columns that several arms share, so that a cell is at the same place in each."""

    over: Over
    lengths: list[int]
    places: list[Place]

    @property
    def row_tokens(self) -> int:
        """Height of a row of positions."""
        if self.over != "position" or len(self.places) < 2:
            return max(self.lengths, default=1)
        return int(float(self.places[1]))

    def cells(self, arm: Arm) -> dict[tuple[int, Place], CellCount]:
        """The arm's cells in this frame."""
        return cell_counts(arm, self.over, self.row_tokens)

    def is_outside(self, length: int, place: Place) -> bool:
        """Whether a row of positions lies beyond a length, so that nothing could be there."""
        return self.over == "position" and float(place) >= length

    def label(self, place: Place) -> str:
        """A row's name."""
        if self.over == "task":
            return str(place)
        if self.over == "position":
            return f"from {length_label(int(float(place)))}"
        return f"{place:g}"


def frame_of(arms: Sequence[Arm], over: Over) -> Frame:
    """Rows and columns of all samples of these arms."""
    samples = [sample for arm in arms for sample in arm.samples]
    lengths = sorted({s.length_tokens for s in samples})
    if over == "position":
        return Frame(over, lengths, [*position_rows(max(lengths, default=0))])
    if over == "task":
        return Frame(over, lengths, [*tasks_of(arms)])
    return Frame(over, lengths, [*sorted({s.depth for s in samples})])


def length_label(tokens: int) -> str:
    """A length for people: 2048 is '2K', 14848 is '14.5K', 1048576 is '1M', 1000 stays '1,000'."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens * 2 % unit == 0:
            return f"{tokens / unit:g}{name}"
    return f"{tokens:,}"
