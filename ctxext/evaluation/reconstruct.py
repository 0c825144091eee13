"""The exact prompt of a stored sample, made again from suite, seed and tokenizer, and proven by its hash.

Prompts are not stored: a pure function of suite and sample makes them, and the stored hash tells whether what it makes
today is what the model read. Where it is not, the reason is looked for.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ctxext.errors import ArtefactError, CtxextError, UsageError
from ctxext.evaluation.failures import worst_first
from ctxext.evaluation.haystack import load_haystack
from ctxext.evaluation.prompt import Prompt, prompt_identity
from ctxext.evaluation.store import SampleResult
from ctxext.evaluation.suite import Sample, Suite

WORST = "worst"
_AROUND = 40
_ENDS = 60
_PACKAGES = ("ctxext", "tokenizers", "transformers")


class Builder(Protocol):
    """Makes the prompt of a sample."""

    def build(self, sample: Sample) -> Prompt:
        """A pure function of the sample."""


@dataclass(frozen=True)
class Reconstruction:
    """A stored sample with its prompt, whose hash is the stored one."""

    sample: SampleResult
    prompt: Prompt


def find_sample(samples: Sequence[SampleResult], wanted: str) -> SampleResult:
    """The sample of an id, of a part that only one id has, or the `worst` one.

    Worst is the wrong answer to the shortest prompt, which should have been the easiest; degenerate ones before others.

    Raises:
        UsageError: none, or several.
    """
    if wanted == WORST:
        scored = [sample for sample in samples if sample.status == "ok"]
        if not scored:
            raise UsageError("no sample has a score", where="SAMPLE", got=wanted)
        wrong = [sample for sample in scored if sample.score < 1.0] or scored
        return min(wrong, key=worst_first)
    exact = [sample for sample in samples if sample.sample_id == wanted]
    found = exact or [sample for sample in samples if wanted in sample.sample_id]
    if len(found) == 1:
        return found[0]
    some = ", ".join(sample.sample_id for sample in (found or samples)[:5])
    raise UsageError(
        f"{len(found)} samples have this in their id" if found else "no sample has this in its id",
        where="SAMPLE",
        got=wanted,
        expected=f"a whole id or a part that only one has, such as of {some}, or '{WORST}'",
    )


def reconstruct(builder: Builder, sample: SampleResult, suite: Suite | None, run: Mapping[str, Any]) -> Reconstruction:
    """Make the prompt again.

    Args:
        suite: what `builder` builds from, to look for reasons.
        run: the `run.json` beside the sample.

    Raises:
        ArtefactError: what is made today is another prompt, with what differs.
    """
    try:
        prompt = builder.build(Sample(sample.cell, sample.index))
    except CtxextError as error:
        raise ArtefactError(
            f"the prompt cannot be made again ({error})",
            where=sample.sample_id,
            hint="; ".join(text_differences(suite, run)) or None,
        ) from error
    if prompt.prompt_sha256 != sample.prompt_sha256:
        raise ArtefactError(
            "the prompt made today is not the one that was answered",
            where=sample.sample_id,
            got=f"prompt {prompt.prompt_sha256[:16]}",
            expected=f"{sample.prompt_sha256[:16]}; what differs: {'; '.join(differences(prompt, sample, suite, run))}",
        )
    return Reconstruction(sample, prompt)


def differences(prompt: Prompt, sample: SampleResult, suite: Suite | None, run: Mapping[str, Any]) -> list[str]:
    """Why a prompt is another one than the stored, as far as can be told."""
    found = text_differences(suite, run)
    if (prompt.key, prompt.expected) != (sample.key, sample.expected):
        found.append(
            f"the question (asked about '{prompt.key}', expecting '{prompt.expected}'; stored: '{sample.key}', "
            f"'{sample.expected}'), so this version draws samples differently or the suite is another"
        )
    elif not found and prompt.haystack_sha256 != sample.haystack_sha256:
        found.append("the haystack's token ids although its text is the same, so the tokenizer is another one")
    elif not found:
        found.append("only what stands around the text: the wording, the chat template, or how the tokenizer joins it")
    return found + version_differences(run)


def text_differences(suite: Suite | None, run: Mapping[str, Any]) -> list[str]:
    """Parts of the stored identity that the suite does not give today: haystacks, files, seed, form."""
    if suite is None:
        return []
    stored = run.get("identity", {})
    try:
        present = prompt_identity(suite)
    except CtxextError as error:
        return [f"the suite's texts cannot be read ({error})"]
    found = []
    for key, value in present.items():
        if key == "metric" or key not in stored or stored[key] == value:
            continue
        if key == "haystack_sha256":
            then = run.get("environment", {}).get("python")
            which = f" (samples of Python {then})" if suite.haystack == "python-docs" and then else ""
            found.append(f"the text of haystack {load_haystack(suite.haystack).name}{which}")
        elif key == "tasks":
            found += _task_differences(value, stored[key])
        else:
            found.append(f"{key} ({stored[key]} then, {value} now)")
    return found


def version_differences(run: Mapping[str, Any]) -> list[str]:
    """Packages that made the sample in another version than the installed one."""
    then = run.get("environment", {}).get("packages", {})
    found = []
    for name in _PACKAGES:
        now = importlib.metadata.version(name)
        if name in then and then[name] != now:
            found.append(f"{name} {then[name]} then, {now} now")
    return found


def describe(made: Reconstruction, tokenizer: Any, *, full: bool = False) -> list[str]:
    """The prompt for people: facts, its head, what surrounds the places that are asked about, its tail.

    Args:
        full: the whole text instead of pieces.
    """
    sample, prompt = made.sample, made.prompt
    ids = prompt.input_ids
    asked = [span for span in prompt.spans if span.asked]
    beside = ", ".join(f"{name} {score:g}" for name, score in sample.scores.items() if name != sample.metric)
    lines = [
        f"sample    {sample.sample_id}",
        f"prompt    {len(ids):,} tokens, hash {sample.prompt_sha256[:16]} as stored",
        f"asked     {sample.key or '(the only needle)'}",
        f"expected  {printable(sample.expected)}",
        f"answered  {printable(sample.answer)!r}" if sample.status == "ok" else f"answered  nothing: {sample.status}",
    ]
    if sample.status == "ok":
        kind = f", {sample.degenerate}" if sample.degenerate else ""
        lines.append(f"score     {sample.score:g} by {sample.metric}{f' ({beside})' if beside else ''}{kind}")
    places = [f"{span.start:,} to {span.end - 1:,} ({span.start / len(ids):.1%})" for span in asked]
    lines.append(f"needle    tokens {', '.join(places) or f'none placed; position {prompt.needle_position:,}'}")
    pieces = [(0, len(ids))] if full else _pieces([(s.start, s.end) for s in asked], len(ids))
    for start, end in pieces:
        lines += [f"--- tokens {start:,} to {end - 1:,}", printable(str(tokenizer.decode(ids[start:end])))]
    return lines


def printable(text: str) -> str:
    """Text without characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in text)


def _task_differences(present: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    found = []
    for task, options in present.items():
        old = stored.get(task)
        if old is None:
            found.append(f"task {task}, which the stored evaluation does not have")
            continue
        changed = [key for key in options if key != "metric" and options[key] != old.get(key)]
        found += [f"{key} of task {task}" for key in changed]
    return found


def _pieces(spans: Sequence[tuple[int, int]], num_tokens: int) -> list[tuple[int, int]]:
    """Head, surroundings of every span, tail; pieces that touch become one."""
    wanted = [(0, _ENDS), *((start - _AROUND, end + _AROUND) for start, end in spans), (num_tokens - _ENDS, num_tokens)]
    pieces: list[tuple[int, int]] = []
    for start, end in sorted((max(start, 0), min(end, num_tokens)) for start, end in wanted):
        if pieces and start <= pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], max(end, pieces[-1][1]))
        else:
            pieces.append((start, end))
    return pieces
