"""The error tree: what failed, where, what was seen, what is accepted, what to do next.

Every error that a user can cause derives from `CtxextError`, prints as one sentence without a traceback,
and carries the exit code of its family. Anything else that escapes is a bug (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class CtxextError(Exception):
    """Base of all expected errors.

    Args:
        what: what failed, as the start of a sentence without a full stop.
        where: `file:line`, a key or a path.
        got: the value seen.
        expected: what is accepted.
        hint: what to do next.
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.got = got
        self.expected = expected
        self.hint = hint
        super().__init__(self.sentence())

    def sentence(self) -> str:
        """The whole message as one line of text."""
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.got is not None:
            parts.append(f"; got {self.got!r}" if not isinstance(self.got, str) else f"; got '{self.got}'")
        if self.expected:
            parts.append(f"; expected {self.expected}")
        text = "".join(parts)
        return f"{text}. {self.hint}" if self.hint else f"{text}."


class UsageError(CtxextError):
    """A wrong command line or a wrong argument of a public function."""

    exit_code = 2


class RecipeError(CtxextError):
    """One or more problems in a recipe or suite, reported together."""

    exit_code = 2

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__(f"{count} in {source}:\n" + "\n".join(f"  {problem}" for problem in problems))

    def sentence(self) -> str:
        return self.what


class ResumeError(CtxextError):
    """What is stored belongs to a run with other settings, which are shown as a table.

    Args:
        table: lines of what differs.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str, table: str, hint: str) -> None:
        self.table = table
        super().__init__(what, where=where, hint=hint)

    def sentence(self) -> str:
        return f"{self.where}: {self.what}\n{self.table}\n{self.hint}"


class UnsupportedModelError(CtxextError):
    """The model's positions cannot be extended by rewriting RoPE."""

    exit_code = 3


class ArtefactError(CtxextError):
    """A model, checkpoint, adapter or data file that is missing, damaged or unsafe."""

    exit_code = 3


class PositionsNotInEffectError(ArtefactError):
    """A rotary module does not compute what the extended config says."""


class ResourceError(CtxextError):
    """The machine lacks what the job needs: memory, disk, device, processes."""

    exit_code = 4


class DivergedError(CtxextError):
    """Training produced a non-finite loss or gradient; nothing was written after it."""

    exit_code = 5


class GateError(CtxextError):
    """An evaluation gate of the recipe was not met."""

    exit_code = 6


class InterruptedRunError(CtxextError):
    """The run ended early, saved and resumable: 130 by SIGINT, 143 by SIGTERM, 7 by the recipe's own time limit."""

    exit_code = 7

    def __init__(self, what: str, *, signal_number: int | None, hint: str | None = None) -> None:
        self.signal_number = signal_number
        super().__init__(what, hint=hint)


def exit_code_of(error: BaseException) -> int:
    """Exit code for `error`: its family's code, 128 + signal for interruptions by one, 1 for a bug."""
    if isinstance(error, InterruptedRunError) and error.signal_number is not None:
        return 128 + error.signal_number
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, CtxextError):
        return error.exit_code
    return 1


def did_you_mean(word: str, choices: Iterable[str]) -> str | None:
    """The choice nearest to `word`, or None when nothing is near."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, choices: Iterable[str], *, where: str | None = None) -> UsageError:
    """An error for a name that is not in a registry, with a suggestion and the accepted names."""
    accepted = sorted(choices)
    near = did_you_mean(name, accepted)
    return UsageError(
        f"unknown {kind}",
        where=where,
        got=name,
        expected="one of " + ", ".join(accepted),
        hint=f"Did you mean '{near}'?" if near else None,
    )


def first_line(error: BaseException) -> str:
    """Another library's error in one line: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
