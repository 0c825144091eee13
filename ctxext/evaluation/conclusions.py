"""From the samples of several arms to honest sentences. Pure: no files, no pictures.

A gain counts as context extension only beyond the original length and only against the control arm (the same training
without the RoPE rewrite) on the same prompts. Inside the original length training on facts alone repairs retrieval, so
what is gained there is reported as retrieval training. Live and recorded arms are never compared with each other: the
claim comes from one set of arms that were trained and evaluated alike. Prompts that share a haystack are a cluster:
they are compared by a test that flips whole clusters, and every claim is limited to the lengths that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ctxext.evaluation.arms import (
    NEEDLE_TASK,
    Arm,
    ArmName,
    arms_by_origin,
    block_spans,
    compare_arms,
    coverage_of,
    coverage_sentence,
    mean_loss,
    without_controls,
)
from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.controls import control_statements
from ctxext.evaluation.effective_length import RULER_TASKS, holes, needle_effective_lengths, ruler_effective_length
from ctxext.evaluation.gains import before_after_statements, gain_statements, inside_statements, sharing_statements
from ctxext.evaluation.statement import Statement, Verdict, origin
from ctxext.evaluation.statistics import MeanDifference, Proportion, counted, paired_difference
from ctxext.evaluation.store import SampleResult, by_length, score_of
from ctxext.evaluation.tail import TailNumber, tail_number

__all__ = [
    "LOSS_MARGIN_NATS",
    "NEEDLE_TASK",
    "Arm",
    "ArmName",
    "Statement",
    "TableRow",
    "arms_by_origin",
    "block_spans",
    "compare_arms",
    "coverage_sentence",
    "draw_conclusions",
    "mean_loss",
    "table_rows",
]

LOSS_MARGIN_NATS = 0.05

_DEFINITIONS = {
    "absolute": "more than 0.856 right",
    "relative": "at least 0.85 of the arm's own share at its shortest length",
}


@dataclass(frozen=True)
class TableRow:
    """An arm's line in the table: right answers by length, mean loss at one length beyond the original."""

    arm: Arm
    by_length: dict[int, Proportion]
    num_missing: int
    loss_length_tokens: int | None
    mean_loss: float | None


def draw_conclusions(
    arms: Sequence[Arm], *, original_length: int, target_length: int, answer_tokens: int = 0
) -> list[Statement]:
    """Everything that may be said about the arms, the claim first.

    Args:
        arms: of any names and any number; samples without a needle count as controls only.
        answer_tokens: room for the answer, which belongs to the measured length.

    Raises:
        ValueError: the same arm twice.
    """
    groups = arms_by_origin([without_controls(arm) for arm in arms])
    statements = gain_statements(groups, original_length)
    statements += before_after_statements(groups, original_length)
    for describe in (
        lambda group: inside_statements(group, original_length),
        lambda group: _short_loss(group, original_length),
        sharing_statements,
        lambda group: [*_effective_lengths(group), *_ruler(group), *_tails(group)],
    ):
        statements += [statement for group in groups for statement in describe(group)]
    statements += control_statements(arms, original_length)
    return statements + [s for group in groups for s in _coverage(group, original_length, target_length, answer_tokens)]


def table_rows(arms: Sequence[Arm], *, original_length: int) -> list[TableRow]:
    """One row an arm. The loss is taken at the longest length beyond the original one that all arms have, if any."""
    measured = [without_controls(arm) for arm in arms]
    beyond = [{s.length_tokens for s in arm.scored if s.length_tokens > original_length} for arm in measured]
    shared = set.intersection(*beyond) or set.union(*beyond) if beyond else set()
    longest = max(shared, default=None)
    rows = []
    for arm in measured:
        losses = [loss for s in arm.scored if s.length_tokens == longest and (loss := mean_loss(s)) is not None]
        mean = sum(losses) / len(losses) if losses else None
        missing = len(arm.samples) - len(arm.scored)
        rows.append(TableRow(arm, by_length(arm.samples), missing, longest, mean))
    return rows


def _short_loss(group: Mapping[str, Arm], original_length: int) -> list[Statement]:
    base = group.get("base")
    inside = [s.length_tokens for s in base.scored if s.length_tokens <= original_length] if base else []
    if base is None or not inside:
        return []
    shortest = min(inside)
    statements = []
    for name in sorted(group.keys() - {"base"}, key=lambda name: (name != "extended", name != "control")):
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
    lead = f"{origin(arm)}Short-context loss of the {arm.name} arm ({closing})"
    detail = (
        f"at {shortest:,} tokens, {arm.name} minus base {difference.mean:+.3f} nats "
        f"(95% interval {low} to {high}; {percent:+.1f}% perplexity) over {counted(difference.num_pairs, 'prompt')}"
    )
    if difference.num_clusters is not None:
        detail += f" of {counted(difference.num_clusters, 'haystack')}"
    bound = 100 * math.expm1(difference.high) if math.isfinite(difference.high) else None
    if bound is not None:
        detail += f"; at most {bound:+.1f}% perplexity by the upper bound"
    numbers = {
        "arm": arm.name,
        "length_tokens": shortest,
        "num_pairs": difference.num_pairs,
        "difference_nats": difference.mean,
        "interval_95": [end if math.isfinite(end) else None for end in ends],
        "perplexity_percent": percent,
        "perplexity_percent_bound": bound,
        "margin_nats": LOSS_MARGIN_NATS,
    }
    return Statement("short_loss", verdict, lead, detail, arm.recorded, False, numbers)


def _effective_lengths(group: Mapping[str, Arm]) -> list[Statement]:
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
            first = next(iter(group.values()))
            lead = f"{origin(first)}{_length_name(first)} ({meaning}; nothing interpolated)"
            facts = {"definition": definition, "arms": numbers}
            statements.append(
                Statement("effective_length", "reported", lead, "; ".join(texts), first.recorded, False, facts)
            )
    return statements


def _ruler(group: Mapping[str, Arm]) -> list[Statement]:
    """RULER's definition, where all of its 13 tasks were measured: the name effective length alone belongs to it."""
    texts, numbers = [], []
    for arm in group.values():
        lengths = sorted({sample.length_tokens for sample in arm.scored})
        means = {
            length: {
                task: score.value
                for task in RULER_TASKS
                if (score := score_of(s for s in arm.samples if (s.task, s.length_tokens) == (task, length)))
            }
            for length in lengths
        }
        complete = {length: scores for length, scores in means.items() if len(scores) == len(RULER_TASKS)}
        if complete:
            found = ruler_effective_length(complete)
            means_text = ", ".join(f"{sum(s.values()) / len(s):.3f} at {n:,}" for n, s in complete.items())
            texts.append(f"{arm.name} {found.text()} (means {means_text})")
            numbers.append({"arm": arm.name, "tokens": found.tokens, "longest_tokens": found.longest_tokens})
    if not texts:
        return []
    first = next(iter(group.values()))
    lead = (
        f"{origin(first)}Effective length (mean of RULER's 13 tasks above 0.856; ctxext's prompts, not RULER's files)"
    )
    facts = {"definition": "ruler", "arms": numbers}
    return [Statement("effective_length", "reported", lead, "; ".join(texts), first.recorded, False, facts)]


def _tails(group: Mapping[str, Arm]) -> list[Statement]:
    """How much worse each arm reads the end of its longest prompts than their beginning."""
    found = [(arm, tail) for arm in group.values() if isinstance(tail := tail_number(_needles(arm)), TailNumber)]
    if not found:
        return []
    arm = found[0][0]
    lead = f"{origin(arm)}Tail number (share right in the last tenth of the positions minus the first tenth)"
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
    """The needle's samples; of an arm with one task, that task's."""
    task = arm.tasks[0] if len(arm.tasks) == 1 else NEEDLE_TASK
    return arm.of_task(task).samples


def _length_name(arm: Arm) -> str:
    """Neither name is RULER's, which belongs to the mean of its 13 tasks."""
    if len(arm.tasks) == 1 and arm.tasks[0] != NEEDLE_TASK:
        return f"Task-effective length of {arm.tasks[0]}"
    return "Needle-effective length"


def _coverage(
    group: Mapping[str, Arm], original_length: int, target_length: int, answer_tokens: int
) -> list[Statement]:
    arms = list(group.values())
    coverage = coverage_of(arms, target_length, answer_tokens)
    if coverage.reached:
        return []
    longest = coverage.longest_tokens
    lead = f"{origin(arms[0])}Not measured up to the target length of {target_length:,} tokens"
    detail = "no prompt has a score"
    if longest:
        detail = f"the longest scored prompt has {longest:,}, and nothing is claimed beyond it"
    numbers = {"longest_tokens": longest, "original_length": original_length, "target_length": target_length}
    return [Statement("coverage", "reported", lead, detail, arms[0].recorded, numbers=numbers)]
