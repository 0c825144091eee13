"""What a source holds but training cannot use: named with file and line, counted, and refused beyond a limit.

Two things are kept apart. *Unusable* rows and files (broken, not text) count against `max_bad_rows`, which is 0 unless
the recipe says otherwise. What is *left out* on purpose (empty rows, vendored code) is counted too, and never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ctxext.errors import ArtefactError

_MAX_EXAMPLES = 3
_REPAIR = "Correct the data, or set max_bad_rows of this source to go on without it."


@dataclass
class Tally:
    """How often something happened, with the first places."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, examples: list[str]) -> None:
        """Count more of it; only the first places are kept."""
        self.count += count
        self.examples += examples[: _MAX_EXAMPLES - len(self.examples)]


class BadRows:
    """Counts per reason, over all parts of one source.

    Args:
        limit: how many rows and files may be unusable (`max_bad_rows`).
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.bad: dict[str, Tally] = {}
        self.left_out: dict[str, Tally] = {}

    @property
    def num_bad(self) -> int:
        """Unusable rows and files so far."""
        return sum(tally.count for tally in self.bad.values())

    def refuse(self, where: object, reason: str, *, got: str | None = None, hint: str | None = None) -> None:
        """Count an unusable row or file.

        Args:
            where: what prints as `file:line` or what comes nearest; a line may be costly to count.
            reason: the kind of trouble, the same words for the same kind.
            got: what was seen in this one.
            hint: what to do about this kind; the general way out follows it.

        Raises:
            ArtefactError: more than `limit` of them.
        """
        self._count(self.bad, where, reason)
        if self.num_bad > self.limit:
            raise self._too_many(str(where), reason, got, hint)

    def leave_out(self, where: object, reason: str) -> None:
        """Count what is left out on purpose."""
        self._count(self.left_out, where, reason)

    def merge(self, facts: Mapping[str, Any]) -> None:
        """Add what another process counted (its `facts()`).

        Raises:
            ArtefactError: together they are more than `limit`.
        """
        for mine, theirs in ((self.bad, facts["bad"]), (self.left_out, facts["left_out"])):
            for reason, tally in theirs.items():
                mine.setdefault(reason, Tally()).add(tally["count"], list(tally["examples"]))
        if self.num_bad > self.limit:
            reason, tally = next(iter(self.bad.items()))
            raise self._too_many(tally.examples[0], reason, None, None)

    def facts(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Plain values for reports and for `merge`."""
        return {
            name: {reason: {"count": tally.count, "examples": list(tally.examples)} for reason, tally in table.items()}
            for name, table in (("bad", self.bad), ("left_out", self.left_out))
        }

    def lines(self) -> list[str]:
        """One sentence a reason, for people."""
        return [
            f"{tally.count:,} {kind}: {reason} ({', '.join(tally.examples)}{', ...' if tally.count > 3 else ''})"
            for kind, table in (("unusable", self.bad), ("left out", self.left_out))
            for reason, tally in table.items()
        ]

    def _count(self, table: dict[str, Tally], where: object, reason: str) -> None:
        tally = table.setdefault(reason, Tally())
        tally.add(1, [str(where)] if len(tally.examples) < _MAX_EXAMPLES else [])

    def _too_many(self, where: str, reason: str, got: str | None, hint: str | None) -> ArtefactError:
        if self.limit:
            counts = ", ".join(f"{tally.count} x {reason}" for reason, tally in self.bad.items())
            reason = f"{reason}; with it {self.num_bad} rows or files are unusable ({counts})"
            expected = f"at most {self.limit} (max_bad_rows)"
        else:
            expected = None
        return ArtefactError(
            reason, where=where, got=got, expected=expected, hint=f"{hint} {_REPAIR}" if hint else _REPAIR
        )
