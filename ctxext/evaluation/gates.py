"""Are the gates of a recipe met? Pure: samples in, outcomes out. What cannot be judged is not met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ctxext.errors import GateError
from ctxext.evaluation.arms import Arm, compare_arms, without_controls
from ctxext.evaluation.effective_length import effective_length, scores_by_length
from ctxext.evaluation.short_context import short_context_cost
from ctxext.evaluation.statistics import counted
from ctxext.evaluation.store import SampleResult
from ctxext.evaluation.tail import NoTail, tail_number
from ctxext.recipe.gates import GatesBlock


@dataclass(frozen=True)
class GateOutcome:
    """One gate: met or not, and why, in words and numbers."""

    name: str
    met: bool
    detail: str
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """'Gate tail: not met: ...'."""
        return f"Gate {self.name}: {'met' if self.met else 'not met'}: {self.detail}."


def check_gates(
    gates: GatesBlock,
    arms: Sequence[Arm],
    *,
    original_length: int,
    judged: str = "extended",
    task: str = "needle",
    answer_tokens: int = 0,
) -> list[GateOutcome]:
    """The outcome of every gate that is asked for, in the order of the block's fields.

    Args:
        arms: of the run; recorded ones are ignored, since another machine's samples say nothing about this model.
        judged: name of the arm that the gates are about.
        task: whose samples tail and effective length are taken from.
        answer_tokens: room for the answer, which belongs to an effective length: a prompt of 16,368 tokens with an
            answer of 16 fills 16,384.
    """
    live = {arm.name: without_controls(arm) for arm in arms if not arm.recorded}
    arm = live.get(judged)
    samples = [sample for sample in arm.samples if sample.task == task] if arm else []
    outcomes = []
    if gates.tail is not None:
        outcomes.append(_tail(gates, samples, gates.tail))
    if gates.effective_length is not None:
        outcomes.append(_effective_length(gates, samples, gates.effective_length, answer_tokens))
    if gates.short_context_cost is not None:
        outcomes.append(_short(gates, arm, live.get("base"), gates.short_context_cost, original_length))
    if gates.better_than is not None:
        rival = live.get(gates.better_than)
        outcomes.append(_better(arm, rival, gates.better_than, original_length))
    return outcomes


def gate_error(outcomes: Sequence[GateOutcome]) -> GateError | None:
    """The error of exit code 6 when some gate is not met."""
    failed = [outcome for outcome in outcomes if not outcome.met]
    if not failed:
        return None
    reasons = "; ".join(f"{outcome.name}: {outcome.detail}" for outcome in failed)
    return GateError(
        f"{counted(len(failed), 'evaluation gate')} of {len(outcomes)} not met ({reasons})",
        where="evaluation.gates",
        hint="The trained model, its samples and the report are kept.",
    )


def _tail(gates: GatesBlock, samples: list[SampleResult], asked: float) -> GateOutcome:
    tail = tail_number(samples)
    if isinstance(tail, NoTail):
        return GateOutcome("tail", False, tail.reason, {"asked": asked})
    value = tail.difference.low if gates.by == "bound" else tail.difference.value
    numbers = {
        "asked": asked,
        "by": gates.by,
        "value": tail.difference.value,
        "interval_95": [tail.difference.low, tail.difference.high],
        "length_tokens": tail.length_tokens,
        "num_pairs": tail.num_pairs,
    }
    detail = f"{_which('lower', gates)} {value:+.2f} at {tail.length_tokens:,} tokens, at least {asked:+.2f} was asked"
    return GateOutcome("tail", value >= asked, detail, numbers)


def _effective_length(gates: GatesBlock, samples: list[SampleResult], asked: int, answer_tokens: int) -> GateOutcome:
    scores = scores_by_length(samples)
    if not scores:
        return GateOutcome("effective_length", False, "no sample has a score", {"asked": asked})
    found = effective_length(scores, "absolute", gates.by)
    reached = (found.tokens or 0) + answer_tokens
    detail = f"{found.text()} by {'the lower bound' if gates.by == 'bound' else 'estimate'}, {asked:,} was asked"
    if found.is_open and reached < asked:
        detail += ", and nothing longer was tested"
    numbers = {"asked": asked, "by": gates.by, "tokens": found.tokens, "longest_tokens": found.longest_tokens}
    return GateOutcome("effective_length", found.tokens is not None and reached >= asked, detail, numbers)


def _short(gates: GatesBlock, arm: Arm | None, base: Arm | None, asked: float, original_length: int) -> GateOutcome:
    name = "short_context_cost"
    if arm is None or base is None:
        return GateOutcome(name, False, "the base or the judged arm was not evaluated", {"asked": asked})
    cost = short_context_cost(arm, base, original_length=original_length)
    if cost is None:
        return GateOutcome(name, False, "no short prompt has losses in both arms", {"asked": asked})
    value = cost.perplexity_bound if gates.by == "bound" else cost.perplexity_increase
    numbers = {
        "asked": asked,
        "by": gates.by,
        "perplexity_increase": cost.perplexity_increase,
        "upper_bound": None if math.isinf(cost.perplexity_bound) else cost.perplexity_bound,
        "length_tokens": cost.length_tokens,
        "num_pairs": cost.difference.num_pairs,
    }
    found = "one prompt has no upper bound" if math.isinf(value) else f"{_which('upper', gates)} {value:+.1%}"
    detail = f"{found} perplexity at {cost.length_tokens:,} tokens, at most {asked:+.1%} was asked"
    return GateOutcome(name, value <= asked, detail, numbers)


def _better(arm: Arm | None, rival: Arm | None, name: str, original_length: int) -> GateOutcome:
    gate = f"better_than {name}"
    if arm is None or rival is None:
        return GateOutcome(gate, False, "one of the two arms was not evaluated in this run")
    comparison = compare_arms(arm, rival, lambda sample: sample.length_tokens > original_length)
    if comparison is None:
        return GateOutcome(gate, False, f"no common scored prompt beyond {original_length:,} tokens")
    detail = (
        f"{comparison.verdict(arm.name, name)} beyond {original_length:,} tokens, {comparison.first.text()} against "
        f"{comparison.second.text()}"
    )
    numbers = {"p_value": comparison.p_value, "test": comparison.test, "num_pairs": comparison.num_pairs}
    return GateOutcome(gate, comparison.better == "first", detail, numbers)


def _which(end: str, gates: GatesBlock) -> str:
    return f"{end} 95% bound" if gates.by == "bound" else "estimate"
