"""The controls of an evaluation: what is right without a needle, what the model can do at all, and how it fails.

A share of right answers means little alone. Without a needle in the text everything right is right by chance; a model
that misses the needle of the shortest prompt lacks the ability, not the positions; and an answer that is empty, repeats
itself or never ends is another failure than a wrong one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ctxext.evaluation.arms import Arm, only_controls, without_controls
from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.statement import Statement, origin, share_numbers
from ctxext.evaluation.statistics import MeanScore, Proportion, clustered_wilson
from ctxext.evaluation.store import SampleResult, score_of

ABILITY = 0.85


@dataclass(frozen=True)
class Degenerate:
    """Answers that are none."""

    share: Proportion
    kinds: dict[str, int]

    def text(self) -> str:
        """'3 of 10 (0.11-0.60): 2 repeating, 1 empty'."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        return f"{self.share.text()}{f': {kinds}' if kinds else ''}"


@dataclass(frozen=True)
class Controls:
    """One arm's controls.

    Attributes:
        chance: right answers to prompts without a needle; None when none was asked.
        shortest: mean score at the shortest length, `shortest_tokens`.
        inside, beyond: degenerate answers on both sides of the original length.
    """

    arm: Arm
    chance: Proportion | None
    shortest_tokens: int | None
    shortest: MeanScore | None
    inside: Degenerate | None
    beyond: Degenerate | None


def controls_of(arm: Arm, original_length: int) -> Controls:
    """The controls of one arm."""
    measured = without_controls(arm)
    chance = only_controls(arm).scored
    shortest = min((sample.length_tokens for sample in measured.samples), default=None)
    return Controls(
        arm=arm,
        chance=_share([s.score >= 1.0 for s in chance], chance) if chance else None,
        shortest_tokens=shortest,
        shortest=score_of(sample for sample in measured.samples if sample.length_tokens == shortest),
        inside=degenerate(s for s in measured.samples if s.length_tokens <= original_length),
        beyond=degenerate(s for s in measured.samples if s.length_tokens > original_length),
    )


def degenerate(samples: Iterable[SampleResult]) -> Degenerate | None:
    """The share of degenerate answers by kind; None where nothing has a score."""
    scored = [sample for sample in samples if sample.status == "ok"]
    if not scored:
        return None
    kinds = Counter(sample.degenerate for sample in scored if sample.degenerate)
    return Degenerate(_share([s.degenerate is not None for s in scored], scored), dict(kinds.most_common()))


def control_statements(arms: Sequence[Arm], original_length: int) -> list[Statement]:
    """One sentence a control, over all arms."""
    found = [controls_of(arm, original_length) for arm in arms]
    return [*_chance(found), *_ability(found), *_degenerate(found)]


def _chance(found: Sequence[Controls]) -> list[Statement]:
    asked = [(controls.arm, controls.chance) for controls in found if controls.chance is not None]
    if not asked:
        return []
    detail = ", ".join(f"{_name(arm)} {share.text()} right" for arm, share in asked)
    if any(share.num_successes for _, share in asked):
        detail += "; what is right there is right by chance, or the scoring is wrong, and so is as much of the rest"
    numbers = [{"arm": arm.name, "recorded": arm.recorded, **share_numbers(share)} for arm, share in asked]
    return [Statement("chance", "reported", "Without a needle (chance level)", detail, numbers={"arms": numbers})]


def _ability(found: Sequence[Controls]) -> list[Statement]:
    """Only where the base model already fails on the shortest prompts."""
    low = [c for c in found if c.arm.name == "base" and c.shortest is not None and c.shortest.value < ABILITY]
    statements = []
    for controls in low:
        assert controls.shortest is not None
        detail = (
            f"at {controls.shortest_tokens:,} tokens the base model scores {controls.shortest.text()}, so wrong "
            "answers elsewhere need not be about positions"
        )
        lead = f"{origin(controls.arm)}The shortest length is already hard for the base model"
        numbers = {"length_tokens": controls.shortest_tokens, "score": controls.shortest.value}
        statements.append(Statement("shortest", "reported", lead, detail, controls.arm.recorded, False, numbers))
    return statements


def _degenerate(found: Sequence[Controls]) -> list[Statement]:
    shares = [(controls.arm, controls.beyond) for controls in found if controls.beyond is not None]
    if not shares:
        return []
    lead = "Degenerate answers (empty, repeating or endless) beyond the original length"
    detail = "; ".join(f"{_name(arm)} {share.text()}" for arm, share in shares)
    numbers = [
        {"arm": arm.name, "recorded": arm.recorded, **share_numbers(share.share), "kinds": share.kinds}
        for arm, share in shares
    ]
    return [Statement("degenerate", "reported", lead, detail, numbers={"arms": numbers})]


def _name(arm: Arm) -> str:
    return f"{'recorded ' if arm.recorded else ''}{arm.name}"


def _share(outcomes: Sequence[bool], samples: Sequence[SampleResult]) -> Proportion:
    return clustered_wilson(outcomes, [cluster_of(sample) for sample in samples])
