"""From the samples of several arms to honest sentences. Pure: no files, no pictures.

A gain counts as context extension only beyond the original length and only against the control arm (the same training
without the RoPE rewrite) on the same prompts. Inside the original length training on facts alone repairs retrieval, so
what is gained there is reported as retrieval training. Live and recorded arms are never compared with each other: the
claim comes from one set of arms that were trained and evaluated alike. Prompts that share a haystack are a cluster:
they are compared by a test that flips whole clusters, and every claim is limited to the lengths that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.effective_length import holes, needle_effective_lengths
from ctxext.evaluation.statistics import (
    FEWEST_UNITS,
    MeanDifference,
    PairedComparison,
    Proportion,
    clustered_wilson,
    compare_paired,
    counted,
    paired_difference,
)
from ctxext.evaluation.store import SampleResult, by_length
from ctxext.evaluation.tail import TailNumber, tail_number

LOSS_MARGIN_NATS = 0.05
NEEDLE_TASK = "needle"

ArmName = Literal["base", "untrained", "control", "extended"]
Verdict = Literal["shown", "not shown", "worse", "no claim", "not worse", "not decided", "reported"]
Keep = Callable[[SampleResult], bool]

_NAMES = {"base": "the base model", "extended": "the extended model", "control": "the control arm"}
_DEFINITIONS = {
    "absolute": "more than 0.856 right",
    "relative": "at least 0.85 of the arm's own share at its shortest length",
}
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
        name: what the conclusions know it by (base, untrained, control, extended), or any other.
        label: what people read ("YaRN, 60 steps").
        recorded: made on another machine and shipped, not by this run.
        run: the `run.json` beside the samples.
    """

    name: str
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
        topic: `extension`, `before_after`, `inside`, `short_loss`, `effective_length`, `tail`, `degenerate` or
            `coverage`.
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


def compare_arms(first: Arm, second: Arm, keep: Keep = lambda sample: True) -> PairedComparison | None:
    """Two arms on the prompts that both answered; None when there is none."""
    pairs = first.pairs_with(second, keep)
    if not pairs:
        return None
    outcomes = [(mine.score >= 1.0, theirs.score >= 1.0) for mine, theirs in pairs]
    return compare_paired(outcomes, [cluster_of(mine) for mine, _ in pairs])


def coverage_sentence(longest_tokens: int, target_length: int, answer_tokens: int = 0) -> str | None:
    """What must stand beside every result of a suite that stops short of the target length; None when it does not.

    Args:
        longest_tokens: tokens of the longest prompt.
        answer_tokens: tokens of the answer that fit behind it.
    """
    if longest_tokens + answer_tokens >= target_length:
        return None
    return (
        f"The longest prompt has {longest_tokens:,} of the {target_length:,} tokens of the target length, so nothing "
        f"is claimed beyond {longest_tokens:,} tokens."
    )


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


def draw_conclusions(
    arms: Sequence[Arm], *, original_length: int, target_length: int, answer_tokens: int = 0
) -> list[Statement]:
    """Everything that may be said about the arms, the claim first.

    Args:
        answer_tokens: room for the answer, which belongs to the measured length.

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
    statements += [s for group in groups for s in (*_effective_lengths(group), *_tails(group))]
    statements += _degenerate(arms, original_length)
    return statements + [s for group in groups for s in _coverage(group, original_length, target_length, answer_tokens)]


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
        clustered = [
            (after - before, cluster_of(mine))
            for (after, before), (mine, _) in zip(losses, pairs, strict=True)
            if after is not None and before is not None
        ]
        if clustered:
            differences, clusters = zip(*clustered, strict=True)
            statements.append(_loss_statement(group[name], shortest, paired_difference(differences, clusters)))
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
        f"(95% interval {low} to {high}; {percent:+.1f}% perplexity) over {counted(difference.num_pairs, 'prompt')}"
    )
    if difference.num_clusters is not None:
        detail += f" of {counted(difference.num_clusters, 'haystack')}"
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


def _effective_lengths(group: dict[str, Arm]) -> list[Statement]:
    """One sentence a definition: how far each arm retrieves, by estimate and by lower bound."""
    statements = []
    for definition, meaning in _DEFINITIONS.items():
        texts, numbers = [], []
        for arm in group.values():
            samples = _needles(arm)
            found = {
                length.by: length for length in needle_effective_lengths(samples) if length.definition == definition
            }
            if not found:
                continue
            hidden = holes(samples, found["estimate"].tokens or 0) if definition == "absolute" else []
            texts.append(
                f"{arm.name} {found['estimate'].text()}, by the lower 95% bound {found['bound'].text()}"
                + "".join(f", although depth {hole.depth:g} has {hole.score.text()}" for hole in hidden)
            )
            numbers.append(
                {
                    "arm": arm.name,
                    "estimate_tokens": found["estimate"].tokens,
                    "bound_tokens": found["bound"].tokens,
                    "longest_tokens": found["estimate"].longest_tokens,
                    "holes": [{"depth": hole.depth, "score": hole.score.value} for hole in hidden],
                }
            )
        if texts:
            recorded = next(iter(group.values())).recorded
            lead = f"{_origin(next(iter(group.values())))}Needle-effective length ({meaning}; nothing interpolated)"
            facts = {"definition": definition, "arms": numbers}
            statements.append(Statement("effective_length", "reported", lead, "; ".join(texts), recorded, False, facts))
    return statements


def _tails(group: dict[str, Arm]) -> list[Statement]:
    """How much worse each arm reads the end of its longest prompts than their beginning."""
    found = [(arm, tail) for arm in group.values() if isinstance(tail := tail_number(_needles(arm)), TailNumber)]
    if not found:
        return []
    arm = found[0][0]
    lead = f"{_origin(arm)}Tail number (share right in the last tenth of the positions minus the first tenth)"
    detail = "; ".join(f"{arm.name} {tail.text()}" for arm, tail in found)
    numbers = [
        {
            "arm": arm.name,
            "length_tokens": tail.length_tokens,
            "value": tail.difference.value,
            "interval_95": [tail.difference.low, tail.difference.high],
            "num_pairs": tail.num_pairs,
        }
        for arm, tail in found
    ]
    return [Statement("tail", "reported", lead, detail, arm.recorded, False, {"arms": numbers})]


def _needles(arm: Arm) -> list[SampleResult]:
    return [sample for sample in arm.samples if sample.task == NEEDLE_TASK]


def _degenerate(arms: Sequence[Arm], original_length: int) -> list[Statement]:
    shares: list[tuple[Arm, Proportion]] = []
    for arm in arms:
        beyond = [sample for sample in arm.scored if sample.length_tokens > original_length]
        if beyond:
            outcomes = [sample.degenerate is not None for sample in beyond]
            shares.append((arm, clustered_wilson(outcomes, [cluster_of(sample) for sample in beyond])))
    if not shares:
        return []
    names = [f"{'recorded ' if arm.recorded else ''}{arm.name} {share.text()}" for arm, share in shares]
    lead = "Degenerate answers (empty or repeating) beyond the original length"
    numbers = [{"arm": arm.name, "recorded": arm.recorded, **_share(share)} for arm, share in shares]
    return [Statement("degenerate", "reported", lead, ", ".join(names), numbers={"arms": numbers})]


def _coverage(group: dict[str, Arm], original_length: int, target_length: int, answer_tokens: int) -> list[Statement]:
    arms = list(group.values())
    longest = max((s.length_tokens for arm in arms for s in arm.scored), default=0)
    if coverage_sentence(longest, target_length, answer_tokens) is None:
        return []
    lead = f"{_origin(arms[0])}Not measured up to the target length of {target_length:,} tokens"
    detail = "no prompt has a score"
    if longest:
        detail = f"the longest scored prompt has {longest:,}, and nothing is claimed beyond it"
    numbers = {"longest_tokens": longest, "original_length": original_length, "target_length": target_length}
    return [Statement("coverage", "reported", lead, detail, arms[0].recorded, numbers=numbers)]


@dataclass(frozen=True)
class _Evidence:
    """Two arms on their common prompts."""

    first: str
    second: str
    lengths: list[int]
    tasks: list[str]
    comparison: PairedComparison
    num_haystacks: int
    num_left_out: int

    @property
    def verdict(self) -> Literal["shown", "not shown", "worse"]:
        return {None: "not shown", "first": "shown", "second": "worse"}[self.comparison.better]  # type: ignore[return-value]

    def text(self) -> str:
        """The counts in words; brackets hold Wilson 95% intervals."""
        pair = self.comparison
        parts = [
            f"at {_listed(self.lengths)} tokens {_NAMES[self.first]} is right on {pair.first.text()} and "
            f"{_NAMES[self.second]} on {pair.second.text()} of the same prompts",
            f"{pair.only_first} only {self.first}, {pair.only_second} only {self.second} right, "
            f"{pair.test} p = {pair.p_value:.3g}",
            counted(self.num_haystacks, "haystack"),
        ]
        if len(self.tasks) > 1:
            parts.insert(0, f"all tasks together ({', '.join(self.tasks)})")
        if self.num_haystacks < pair.num_pairs:
            parts[-1] += (
                f" for {pair.num_pairs} prompts, which are therefore not independent; the test flips whole haystacks"
            )
        if pair.num_differing and not pair.decidable:
            unit = "prompt" if pair.test == "McNemar" else "haystack"
            differ = "differs" if pair.num_differing == 1 else "differ"
            parts.append(f"only {counted(pair.num_differing, unit)} {differ}, a verdict needs {FEWEST_UNITS}")
        if self.num_left_out:
            parts.append(f"{counted(self.num_left_out, 'prompt')} without a score in both left out")
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
            "test": pair.test,
            "p_value": pair.p_value,
            "mcnemar_p": pair.p_value if pair.test == "McNemar" else None,
        }


def _compare(first: Arm, second: Arm, keep: Keep) -> _Evidence | None:
    pairs = first.pairs_with(second, keep)
    comparison = compare_arms(first, second, keep)
    if comparison is None:
        return None
    asked = {s.prompt_sha256 for arm in (first, second) for s in arm.samples if keep(s)}
    return _Evidence(
        first=first.name,
        second=second.name,
        lengths=sorted({mine.length_tokens for mine, _ in pairs}),
        tasks=sorted({mine.task for mine, _ in pairs}),
        comparison=comparison,
        num_haystacks=len({mine.haystack_sha256 for mine, _ in pairs}),
        num_left_out=len(asked) - len(pairs),
    )


def _share(share: Proportion) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "count": share.num_successes,
        "of": share.num_trials,
        "wilson_95": [share.low, share.high],
    }
    if share.num_clusters is not None:
        numbers |= {"num_clusters": share.num_clusters, "num_effective": share.num_effective}
    return numbers


def _outcome(evidence: _Evidence) -> str:
    if evidence.verdict == "not shown":
        return "no difference shown"
    return f"{evidence.first} {'better' if evidence.verdict == 'shown' else 'worse'}"


def _origin(arm: Arm) -> str:
    return "Recorded on another machine: " if arm.recorded else ""


def _listed(lengths: list[int]) -> str:
    texts = [f"{length:,}" for length in lengths]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
