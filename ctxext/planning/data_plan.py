"""What a plan says about training text: the recipe's choices in words, before any text is read."""

from __future__ import annotations

from collections.abc import Iterator

from ctxext.data.demand import long_from_of
from ctxext.data.facts import PASSKEY_DIGITS
from ctxext.evaluation.suite import Suite
from ctxext.evaluation.tasks.needle import NeedleTask
from ctxext.recipe.data import DataBlock, LengthBlock, SourceBlock

_WHEN_FOUND = {
    "refuse": "the run stops when training text holds what the suite asks about",
    "exclude": "documents that hold what the suite asks about are left out",
    "report": "documents that hold what the suite asks about are read and reported",
}


def source_words(source: SourceBlock) -> str:
    """A source in a few words."""
    if source.name:
        return f"{source.kind} {source.name}"
    return f"{source.kind} {', '.join(source.paths)}" if source.paths else source.kind


def data_lines(data: DataBlock, window_tokens: int) -> list[str]:
    """Sources with their shares, how lengths are sampled, synthetic facts, contamination."""
    total = sum(source.weight for source in data.sources)
    sources = ", ".join(f"{source_words(source)} {source.weight / total:.0%}" for source in data.sources)
    lines = [sources if len(data.sources) > 1 else source_words(data.sources[0])]
    if lengths := _length_words(data.length, window_tokens):
        lines.append(lengths)
    if data.facts and data.facts.share:
        lines.append(
            f"{data.facts.share:.0%} of the windows carry synthetic facts with questions ({data.facts.style}, "
            f"{data.facts.per_window} a window): they train retrieval, which is not extension"
        )
    return [*lines, f"contamination: {_WHEN_FOUND[data.contamination]}"]


def _length_words(length: LengthBlock, window_tokens: int) -> str | None:
    long_from = long_from_of(length, window_tokens)
    if length.long_share is not None:
        return f"{length.long_share:.0%} of every source's tokens come from documents of {long_from:,} tokens or more"
    if length.upsample is not None:
        return f"documents of {long_from:,} tokens or more are taken {length.upsample:g} times as often"
    return None


def facts_notes(data: DataBlock, suite: Suite) -> Iterator[str]:
    """Where synthetic facts come close to what the suite asks, which every reader of the numbers must know."""
    if data.facts is None or not data.facts.share:
        return
    asks_passkeys = any(isinstance(task, NeedleTask) and task.wording == "passkey" for task in suite.members)
    if data.facts.style == "passkey" and asks_passkeys:
        yield "the synthetic facts have the evaluation's own wording: this shows the method on a toy, nothing more"
    elif data.facts.style == "passkey":
        yield "the synthetic facts have the pass keys' wording of the evaluation; other suites may ask for them"
    elif data.facts.style == "records" and asks_passkeys:
        yield (
            f"a twelfth of the values of data.facts.style: records are bare numbers of {PASSKEY_DIGITS} digits, as "
            "this suite's pass keys are; tables, references and mixed have none"
        )
