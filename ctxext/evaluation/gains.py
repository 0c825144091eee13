"""Who is better beyond the original length, against whom: the claim of context extension and what stands in for it.

Where a control arm was run, every other arm that changes the model is compared with it, and the p values are adjusted
for their number (Holm). Only the arm `extended` had the same training as the control arm, so only its gain is called
context extension. Without a control arm there is a before and an after, and no claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ctxext.evaluation.arms import Arm, Keep, compare_pairs
from ctxext.evaluation.clusters import is_noise
from ctxext.evaluation.statement import Statement, listed, origin, share_numbers
from ctxext.evaluation.statistics import FEWEST_UNITS, PairedComparison, counted, holm

_MAX_NAMED_TASKS = 4
NO_CLAIM = "No claim of context extension is made"
_NAMES = {"base": "the base model", "extended": "the extended model", "control": "the control arm"}
_INSIDE = (
    ("extended", "base", "retrieval training and RoPE rewrite together"),
    ("extended", "control", "RoPE rewrite alone"),
    ("control", "base", "retrieval training alone"),
)


@dataclass(frozen=True)
class Evidence:
    """Two arms on their common prompts.

    Attributes:
        p_adjusted: by Holm over `num_tests` tests that ask the same of several arms.
        num_asked, num_shared: prompts that either and that both were asked.
        num_left_out: shared prompts without a score in both.
        noise: the text is RULER's repeated noise.
    """

    first: str
    second: str
    lengths: list[int]
    tasks: list[str]
    comparison: PairedComparison
    num_clusters: int
    num_asked: int
    num_shared: int
    num_left_out: int
    noise: bool
    p_adjusted: float
    num_tests: int = 1

    @property
    def judged(self) -> PairedComparison:
        """The comparison with the adjusted p value."""
        return replace(self.comparison, p_value=self.p_adjusted)

    @property
    def verdict(self) -> Literal["shown", "not shown", "worse"]:
        """Of the first arm."""
        better = self.judged.better
        return "not shown" if better is None else "shown" if better == "first" else "worse"

    @property
    def outcome(self) -> str:
        """'extended better', 'no difference shown'."""
        if self.verdict == "not shown":
            return "no difference shown"
        return f"{self.first} {'better' if self.verdict == 'shown' else 'worse'}"

    def text(self) -> str:
        """The counts in words; brackets hold Wilson 95% intervals."""
        pair = self.comparison
        p_value = f"{pair.test} p = {pair.p_value:.3g}"
        if self.num_tests > 1:
            p_value += f" (p = {self.p_adjusted:.3g} adjusted for {self.num_tests} comparisons)"
        parts = [
            f"at {listed([f'{length:,}' for length in self.lengths])} tokens {name_of(self.first)} is right on "
            f"{pair.first.text()} and {name_of(self.second)} on {pair.second.text()} of the same prompts",
            f"{pair.only_first} only {self.first}, {pair.only_second} only {self.second} right, {p_value}",
        ]
        if len(self.tasks) > 1:
            few = len(self.tasks) <= _MAX_NAMED_TASKS
            parts.insert(0, f"all tasks together ({', '.join(self.tasks) if few else len(self.tasks)})")
        if self.noise:
            parts.append("the text is repeated noise, one for all prompts: saliency rather than retrieval")
        elif self.num_clusters < pair.num_pairs:
            parts.append(
                f"{counted(self.num_clusters, 'haystack')} for {pair.num_pairs} prompts, which are therefore not "
                "independent; the test flips whole haystacks"
            )
        else:
            parts.append(counted(self.num_clusters, "haystack"))
        if pair.num_differing and not pair.decidable:
            unit = "prompt" if pair.test == "McNemar" else "haystack"
            differ = "differs" if pair.num_differing == 1 else "differ"
            parts.append(f"only {counted(pair.num_differing, unit)} {differ}, a verdict needs {FEWEST_UNITS}")
        if self.num_shared < self.num_asked:
            parts.append(f"the two arms share {self.num_shared} of {self.num_asked} prompts, the others do not count")
        if self.num_left_out:
            parts.append(f"{counted(self.num_left_out, 'prompt')} without a score in both left out")
        return "; ".join(parts)

    def numbers(self) -> dict[str, Any]:
        """The same for programs."""
        pair = self.comparison
        return {
            "first": self.first,
            "second": self.second,
            "lengths_tokens": self.lengths,
            "tasks": self.tasks,
            "num_pairs": pair.num_pairs,
            "num_haystacks": self.num_clusters,
            "num_asked": self.num_asked,
            "num_shared": self.num_shared,
            "num_left_out": self.num_left_out,
            self.first: share_numbers(pair.first),
            self.second: share_numbers(pair.second),
            "only_first": pair.only_first,
            "only_second": pair.only_second,
            "test": pair.test,
            "p_value": pair.p_value,
            "p_adjusted": self.p_adjusted,
            "num_tests": self.num_tests,
            "mcnemar_p": pair.p_value if pair.test == "McNemar" else None,
        }


def name_of(arm: str) -> str:
    """An arm in a sentence."""
    return _NAMES.get(arm, f"the arm {arm}")


def evidence(first: Arm, second: Arm, keep: Keep) -> Evidence | None:
    """Two arms on the prompts that both answered; None when there is none."""
    pairs = first.pairs_with(second, keep)
    if not pairs:
        return None
    comparison = compare_pairs(pairs)
    asked = [{s.prompt_sha256 for s in arm.samples if keep(s)} for arm in (first, second)]
    shared = asked[0] & asked[1]
    return Evidence(
        first=first.name,
        second=second.name,
        lengths=sorted({mine.length_tokens for mine, _ in pairs}),
        tasks=sorted({mine.task for mine, _ in pairs}),
        comparison=comparison,
        num_clusters=comparison.num_units,
        num_asked=len(asked[0] | asked[1]),
        num_shared=len(shared),
        num_left_out=len(shared) - len(pairs),
        noise=all(is_noise(mine) for mine, _ in pairs),
        p_adjusted=comparison.p_value,
    )


def adjusted(found: Sequence[Evidence]) -> list[Evidence]:
    """Tests that belong together, their p values adjusted for each other (Holm 1979)."""
    p_values = holm([one.comparison.p_value for one in found])
    return [
        replace(one, p_adjusted=p_value, num_tests=len(found)) for one, p_value in zip(found, p_values, strict=True)
    ]


def beyond(original_length: int) -> Keep:
    """Keeps prompts longer than the original length; one of exactly that length is inside."""
    return lambda sample: sample.length_tokens > original_length


def against(group: Mapping[str, Arm], reference: str, original_length: int) -> dict[str, Evidence | None]:
    """Every arm but base and control against `reference` beyond the original length, p values adjusted."""
    treated = [arm for name, arm in group.items() if name not in ("base", "control")]
    found = {arm.name: evidence(arm, group[reference], beyond(original_length)) for arm in treated}
    exact = adjusted([one for one in found.values() if one is not None])
    return {**found, **{one.first: one for one in exact}}


def task_gains(group: Mapping[str, Arm], tasks: Sequence[str], original_length: int) -> dict[tuple[str, str], Evidence]:
    """By task and arm: against the control arm (the base model where there is none), p values adjusted over all."""
    reference = next((name for name in ("control", "base") if name in group), None)
    if reference is None:
        return {}
    found = {
        (task, name): one
        for task in tasks
        for name, arm in group.items()
        if name not in ("base", "control")
        and (one := evidence(arm.of_task(task), group[reference].of_task(task), beyond(original_length)))
    }
    return dict(zip(found, adjusted(list(found.values())), strict=True))


def gain_statements(groups: Sequence[Mapping[str, Arm]], original_length: int) -> list[Statement]:
    """The claim first: against the control arm of each origin, or that none was run."""
    statements = [
        _gain(group[name], found, original_length, "extended" in group)
        for group in groups
        if "control" in group
        for name, found in against(group, "control", original_length).items()
    ]
    if not statements and any(name not in ("base", "control") for group in groups for name in group):
        why = "no control arm was run or recorded (the same training without the RoPE rewrite)"
        if any("control" in group for group in groups):
            why = "the control arm has no extended arm of the same origin beside it"
        statements = [Statement("extension", "no claim", NO_CLAIM, why, headline=True)]
    return sorted(statements, key=lambda statement: statement.topic != "extension")


def before_after_statements(groups: Sequence[Mapping[str, Arm]], original_length: int) -> list[Statement]:
    """Arms against the base model of their origin: `extended` beside a control arm, without one every arm."""
    mixed = len(groups) > 1
    statements = []
    for group in groups:
        if "base" not in group:
            continue
        has_control = "control" in group
        judged = {name: arm for name, arm in group.items() if name in ("base", "extended") or not has_control}
        for name, found in against(judged, "base", original_length).items():
            if found is not None:
                statements.append(_before_after(group[name], found, mixed, has_control))
    return statements


def inside_statements(group: Mapping[str, Arm], original_length: int) -> list[Statement]:
    """What changed inside the original length, where no gain is extension."""
    pairs = [*_INSIDE]
    for name in group:
        if name not in ("base", "control", "extended"):
            pairs.append((name, "base", "RoPE rewrite without training" if name == "untrained" else f"arm {name}"))
    statements = []
    for first, second, effect in pairs:
        if not {first, second} <= group.keys():
            continue
        arm = group[first]
        found = evidence(arm, group[second], lambda sample: sample.length_tokens <= original_length)
        if found is not None:
            lead = f"{origin(arm)}Inside the original length, {effect} ({found.outcome}; not extension)"
            statements.append(
                Statement("inside", found.verdict, lead, found.text(), arm.recorded, False, found.numbers())
            )
    return statements


def sharing_statements(group: Mapping[str, Arm]) -> list[Statement]:
    """How many prompts all arms share, where they were asked different ones."""
    asked = {name: {sample.prompt_sha256 for sample in arm.samples} for name, arm in group.items() if arm.samples}
    if len(asked) < 2:
        return []
    shared, together = set.intersection(*asked.values()), set.union(*asked.values())
    if shared == together:
        return []
    each = ", ".join(f"{name} {len(prompts):,}" for name, prompts in asked.items())
    first = next(iter(group.values()))
    numbers = {
        "num_shared": len(shared),
        "num_asked": len(together),
        "arms": {name: len(prompts) for name, prompts in asked.items()},
    }
    detail = (
        f"{len(shared):,} of {len(together):,} are shared by all arms ({each}); comparisons use the prompts that two "
        "arms share, while the averages of each arm rest on its own prompts"
    )
    return [
        Statement(
            "prompts", "reported", f"{origin(first)}Not the same prompts", detail, first.recorded, not shared, numbers
        )
    ]


def _gain(arm: Arm, found: Evidence | None, original_length: int, has_extended: bool) -> Statement:
    is_claim = arm.name == "extended"
    topic, headline = ("extension", True) if is_claim else ("gain", not has_extended)
    if found is None:
        why = f"the {arm.name} and the control arm share no scored prompt beyond {original_length:,} tokens"
        lead = NO_CLAIM if is_claim else f"Nothing is said of the arm {arm.name} beyond the original length"
        return Statement(topic, "no claim", f"{origin(arm)}{lead}", why, arm.recorded, headline)
    lead = f"Beyond the original length, {arm.name} against the control arm ({found.outcome})"
    if is_claim:
        shown = "is shown" if found.verdict == "shown" else "is not shown"
        lead = f"Context extension {shown} against the control arm (same training, no RoPE rewrite)"
    closing = "; the control arm is better" if found.verdict == "worse" else ""
    detail = f"beyond the original length of {original_length:,} tokens, {found.text()}{closing}"
    return Statement(topic, found.verdict, f"{origin(arm)}{lead}", detail, arm.recorded, headline, found.numbers())


def _before_after(arm: Arm, found: Evidence, mixed: bool, has_control: bool) -> Statement:
    opening = "Your run, before and after" if mixed and not arm.recorded else "Before and after"
    who = "" if arm.name == "extended" else f" ({arm.label})"
    lead = f"{origin(arm)}{opening}{who}, beyond the original length ({found.outcome})"
    caveat = "" if has_control else "; without a control arm of its own this is no claim of extension"
    live = not arm.recorded
    return Statement("before_after", found.verdict, lead, f"{found.text()}{caveat}", not live, live, found.numbers())
