"""From the samples of several arms to honest sentences. Pure: no files, no pictures.

A gain counts as context extension only beyond the original length and only against the control arm (the same training
without the RoPE rewrite) on the same prompts. Inside the original length training on facts alone repairs retrieval, so
what is gained there is reported as retrieval training. Live and recorded arms are never compared with each other: the
claim comes from one set of arms that were trained and evaluated alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ctxext.evaluation.statistics import (
    MeanDifference,
    PairedComparison,
    Proportion,
    mcnemar,
    paired_difference,
    wilson,
)
from ctxext.evaluation.store import SampleResult, by_length

SIGNIFICANCE_LEVEL = 0.05
LOSS_MARGIN_NATS = 0.05

ArmName = Literal["base", "untrained", "control", "extended"]
Verdict = Literal["shown", "not shown", "worse", "no claim", "not worse", "not decided", "reported"]
Keep = Callable[[SampleResult], bool]

_NAMES = {"base": "the base model", "extended": "the extended model", "control": "the control arm"}
_NO_CLAIM = "No claim of context extension is made"
_INSIDE = (
    ("extended", "base", "retrieval training and RoPE rewrite together"),
    ("extended", "control", "RoPE rewrite alone"),
    ("control", "base", "retrieval training alone"),
)


@dataclass(frozen=True)
class Arm:
    """One way of treating the model, evaluated on prompts that other arms share.

    Attributes:
        label: what people read ("YaRN, 60 steps").
        recorded: made on another machine and shipped, not by this run.
        run: the `run.json` beside the samples.
    """

    name: ArmName
    label: str
    recorded: bool
    samples: list[SampleResult]
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def scored(self) -> list[SampleResult]:
        """The samples that have a score."""
        return [sample for sample in self.samples if sample.status == "ok"]

    @property
    def num_haystacks(self) -> int:
        """Different haystacks among the scored samples."""
        return len({sample.haystack_sha256 for sample in self.scored})

    def pairs_with(self, other: Arm, keep: Keep = lambda sample: True) -> list[tuple[SampleResult, SampleResult]]:
        """The samples of both arms on the same prompt, scored in both, in this arm's order."""
        theirs = {sample.prompt_sha256: sample for sample in other.scored}
        return [(s, theirs[s.prompt_sha256]) for s in self.scored if keep(s) and s.prompt_sha256 in theirs]


@dataclass(frozen=True)
class Statement:
    """One sentence with what it rests on.

    Attributes:
        topic: `extension`, `before_after`, `inside`, `short_loss`, `degenerate` or `coverage`.
        lead: how the sentence begins, up to the colon: its verdict, for those who skim.
        headline: belongs at the top of a report.
        numbers: the sentence's counts, intervals and p value, JSON-able.
    """

    topic: str
    verdict: Verdict
    lead: str
    detail: str
    recorded: bool = False
    headline: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Lead and detail together."""
        return f"{self.lead}: {self.detail}."


@dataclass(frozen=True)
class TableRow:
    """An arm's line in the table: right answers by length, mean loss at one length beyond the original."""

    arm: Arm
    by_length: dict[int, Proportion]
    num_missing: int
    loss_length_tokens: int | None
    mean_loss: float | None


def block_spans(sample: SampleResult) -> list[tuple[int, int]]:
    """First and last + 1 predicted position of each loss block; nothing predicts position 0."""
    width = sample.loss_block_tokens
    if width < 1:
        return []
    total = sample.length_tokens
    spans = [(max(start, 1), min(start + width, total)) for start in range(0, total, width)]
    return [(start, end) for start, end in spans if end > start]


def mean_loss(sample: SampleResult) -> float | None:
    """Mean next-token loss of the whole prompt in nats, every predicted token counting once."""
    weighed = [(loss, end - start) for loss, (start, end) in zip(sample.loss_blocks, block_spans(sample), strict=False)]
    num_tokens = sum(tokens for _, tokens in weighed)
    return sum(loss * tokens for loss, tokens in weighed) / num_tokens if num_tokens else None


def arms_by_origin(arms: Iterable[Arm]) -> list[dict[str, Arm]]:
    """The live arms and the recorded ones, each by name; empty ones left out.

    Raises:
        ValueError: the same arm twice.
    """
    origins: dict[bool, dict[str, Arm]] = {False: {}, True: {}}
    for arm in arms:
        if arm.name in origins[arm.recorded]:
            raise ValueError(f"the arm {arm.name!r} is given twice (recorded: {arm.recorded})")
        origins[arm.recorded][arm.name] = arm
    return [group for group in origins.values() if group]


def draw_conclusions(arms: Sequence[Arm], *, original_length: int, target_length: int) -> list[Statement]:
    """Everything that may be said about the arms, the claim first.

    Raises:
        ValueError: the same arm twice.
    """
    groups = arms_by_origin(arms)
    mixed = len(groups) > 1
    statements = [_extension(group, original_length) for group in groups if {"extended", "control"} <= group.keys()]
    if not statements and any(arm.name == "extended" for arm in arms):
        statements = [_no_control(arms)]
    statements += [s for group in groups for s in _before_after(group, original_length, mixed)]
    statements += [s for group in groups for s in _inside(group, original_length)]
    statements += [s for group in groups for s in _short_loss(group, original_length)]
    statements += _degenerate(arms, original_length)
    return statements + [s for group in groups for s in _coverage(group, original_length, target_length)]


def table_rows(arms: Sequence[Arm], *, original_length: int) -> list[TableRow]:
    """One row an arm. The loss is taken at the longest length beyond the original one that all arms have, if any."""
    beyond = [{s.length_tokens for s in arm.scored if s.length_tokens > original_length} for arm in arms]
    shared = set.intersection(*beyond) or set.union(*beyond) if beyond else set()
    longest = max(shared, default=None)
    rows = []
    for arm in arms:
        losses = [loss for s in arm.scored if s.length_tokens == longest and (loss := mean_loss(s)) is not None]
        mean = sum(losses) / len(losses) if losses else None
        missing = len(arm.samples) - len(arm.scored)
        rows.append(TableRow(arm, by_length(arm.samples), missing, longest, mean))
    return rows


def _extension(group: dict[str, Arm], original_length: int) -> Statement:
    extended, control = group["extended"], group["control"]
    evidence = _compare(extended, control, lambda sample: sample.length_tokens > original_length)
    origin = _origin(extended)
    if evidence is None:
        why = f"the extended and the control arm share no scored prompt beyond {original_length:,} tokens"
        return Statement("extension", "no claim", f"{origin}{_NO_CLAIM}", why, extended.recorded, headline=True)
    verdict = evidence.verdict
    opening = "Context extension is shown" if verdict == "shown" else "Context extension is not shown"
    against = "against the control arm (same training, no RoPE rewrite)"
    closing = "; the control arm is better" if verdict == "worse" else ""
    detail = f"beyond the original length of {original_length:,} tokens, {evidence.text()}{closing}"
    lead = f"{origin}{opening} {against}"
    return Statement("extension", verdict, lead, detail, extended.recorded, True, evidence.numbers())


def _no_control(arms: Sequence[Arm]) -> Statement:
    controls = [arm for arm in arms if arm.name == "control"]
    why = "no control arm (the same training without the RoPE rewrite) was run or recorded"
    if controls:
        why = "the control arm has no extended arm of the same origin beside it"
    return Statement("extension", "no claim", _NO_CLAIM, why, headline=True)


def _before_after(group: dict[str, Arm], original_length: int, mixed: bool) -> list[Statement]:
    if not {"extended", "base"} <= group.keys():
        return []
    extended = group["extended"]
    evidence = _compare(extended, group["base"], lambda sample: sample.length_tokens > original_length)
    if evidence is None:
        return []
    opening = "Your run, before and after" if mixed and not extended.recorded else "Before and after"
    lead = f"{_origin(extended)}{opening}, beyond the original length ({_outcome(evidence)})"
    caveat = "" if "control" in group else "; without a control arm of its own this is no claim of extension"
    detail = f"{evidence.text()}{caveat}"
    live = not extended.recorded
    return [Statement("before_after", evidence.verdict, lead, detail, not live, live, evidence.numbers())]


def _inside(group: dict[str, Arm], original_length: int) -> list[Statement]:
    statements = []
    for first, second, effect in _INSIDE:
        if not {first, second} <= group.keys():
            continue
        arm = group[first]
        evidence = _compare(arm, group[second], lambda sample: sample.length_tokens <= original_length)
        if evidence is None:
            continue
        lead = f"{_origin(arm)}Inside the original length, {effect} ({_outcome(evidence)}; not extension)"
        numbers = evidence.numbers()
        statements.append(Statement("inside", evidence.verdict, lead, evidence.text(), arm.recorded, False, numbers))
    return statements


def _short_loss(group: dict[str, Arm], original_length: int) -> list[Statement]:
    base = group.get("base")
    inside = [s.length_tokens for s in base.scored if s.length_tokens <= original_length] if base else []
    if base is None or not inside:
        return []
    shortest = min(inside)
    statements = []
    for name in ("extended", "control"):
        if name not in group:
            continue
        pairs = group[name].pairs_with(base, lambda sample: sample.length_tokens == shortest)
        losses = [(mean_loss(mine), mean_loss(before)) for mine, before in pairs]
        differences = [mine - before for mine, before in losses if mine is not None and before is not None]
        if differences:
            statements.append(_loss_statement(group[name], shortest, paired_difference(differences)))
    return statements


def _loss_statement(arm: Arm, shortest: int, difference: MeanDifference) -> Statement:
    margin = f"the margin of {LOSS_MARGIN_NATS:g} nats"
    small = difference.high < LOSS_MARGIN_NATS
    verdict: Verdict = "worse" if difference.low > 0 else "not worse" if small else "not decided"
    closing = {
        "worse": f"worse, by less than {margin}" if small else f"worse, {margin} is not kept",
        "not worse": f"not worse, within {margin}",
        "not decided": f"not decided by these prompts, for {margin}",
    }[verdict]
    ends = [difference.low, difference.high]
    low, high = (f"{end:+.3f}" if math.isfinite(end) else "unbounded" for end in ends)
    percent = 100 * math.expm1(difference.mean)
    lead = f"{_origin(arm)}Short-context loss of the {arm.name} arm ({closing})"
    detail = (
        f"at {shortest:,} tokens, {arm.name} minus base {difference.mean:+.3f} nats "
        f"(95% interval {low} to {high}; {percent:+.1f}% perplexity) over {_count(difference.num_pairs, 'prompt')}"
    )
    numbers = {
        "arm": arm.name,
        "length_tokens": shortest,
        "num_pairs": difference.num_pairs,
        "difference_nats": difference.mean,
        "interval_95": [end if math.isfinite(end) else None for end in ends],
        "perplexity_percent": percent,
        "margin_nats": LOSS_MARGIN_NATS,
    }
    return Statement("short_loss", verdict, lead, detail, arm.recorded, False, numbers)


def _degenerate(arms: Sequence[Arm], original_length: int) -> list[Statement]:
    shares: list[tuple[Arm, Proportion]] = []
    for arm in arms:
        beyond = [sample for sample in arm.scored if sample.length_tokens > original_length]
        if beyond:
            shares.append((arm, wilson(sum(sample.degenerate is not None for sample in beyond), len(beyond))))
    if not shares:
        return []
    names = [f"{'recorded ' if arm.recorded else ''}{arm.name} {share.text()}" for arm, share in shares]
    lead = "Degenerate answers (empty or repeating) beyond the original length"
    numbers = [{"arm": arm.name, "recorded": arm.recorded, **_share(share)} for arm, share in shares]
    return [Statement("degenerate", "reported", lead, ", ".join(names), numbers={"arms": numbers})]


def _coverage(group: dict[str, Arm], original_length: int, target_length: int) -> list[Statement]:
    arms = list(group.values())
    longest = max((s.length_tokens for arm in arms for s in arm.scored), default=0)
    if longest >= target_length:
        return []
    lead = f"{_origin(arms[0])}Not measured up to the target length of {target_length:,} tokens"
    detail = f"the longest scored prompt has {longest:,}" if longest else "no prompt has a score"
    numbers = {"longest_tokens": longest, "original_length": original_length, "target_length": target_length}
    return [Statement("coverage", "reported", lead, detail, arms[0].recorded, numbers=numbers)]


@dataclass(frozen=True)
class _Evidence:
    """Two arms on their common prompts."""

    first: str
    second: str
    lengths: list[int]
    comparison: PairedComparison
    num_haystacks: int
    num_left_out: int

    @property
    def verdict(self) -> Literal["shown", "not shown", "worse"]:
        if self.comparison.p_value >= SIGNIFICANCE_LEVEL:
            return "not shown"
        return "shown" if self.comparison.only_first > self.comparison.only_second else "worse"

    def text(self) -> str:
        """The counts in words; brackets hold Wilson 95% intervals."""
        pair = self.comparison
        parts = [
            f"at {_listed(self.lengths)} tokens {_NAMES[self.first]} is right on {pair.first.text()} and "
            f"{_NAMES[self.second]} on {pair.second.text()} of the same prompts",
            f"{pair.only_first} only {self.first}, {pair.only_second} only {self.second} right, "
            f"McNemar p = {pair.p_value:.3g}",
            _count(self.num_haystacks, "haystack"),
        ]
        if self.num_haystacks < pair.num_pairs:
            parts[-1] += f" for {pair.num_pairs} prompts, which are therefore not independent and p is too small"
        if self.num_left_out:
            parts.append(f"{_count(self.num_left_out, 'prompt')} without a score in both left out")
        return "; ".join(parts)

    def numbers(self) -> dict[str, Any]:
        pair = self.comparison
        return {
            "first": self.first,
            "second": self.second,
            "lengths_tokens": self.lengths,
            "num_pairs": pair.num_pairs,
            "num_haystacks": self.num_haystacks,
            "num_left_out": self.num_left_out,
            self.first: _share(pair.first),
            self.second: _share(pair.second),
            "only_first": pair.only_first,
            "only_second": pair.only_second,
            "mcnemar_p": pair.p_value,
        }


def _compare(first: Arm, second: Arm, keep: Keep) -> _Evidence | None:
    pairs = first.pairs_with(second, keep)
    if not pairs:
        return None
    asked = {s.prompt_sha256 for arm in (first, second) for s in arm.samples if keep(s)}
    return _Evidence(
        first=first.name,
        second=second.name,
        lengths=sorted({mine.length_tokens for mine, _ in pairs}),
        comparison=mcnemar((mine.score >= 1.0, theirs.score >= 1.0) for mine, theirs in pairs),
        num_haystacks=len({mine.haystack_sha256 for mine, _ in pairs}),
        num_left_out=len(asked) - len(pairs),
    )


def _share(share: Proportion) -> dict[str, Any]:
    return {"count": share.num_successes, "of": share.num_trials, "wilson_95": [share.low, share.high]}


def _outcome(evidence: _Evidence) -> str:
    if evidence.verdict == "not shown":
        return "no difference shown"
    return f"{evidence.first} {'better' if evidence.verdict == 'shown' else 'worse'}"


def _origin(arm: Arm) -> str:
    return "Recorded on another machine: " if arm.recorded else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(lengths: list[int]) -> str:
    texts = [f"{length:,}" for length in lengths]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
