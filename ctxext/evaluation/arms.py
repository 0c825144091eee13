"""Arms: the same prompts, answered by differently treated models. Pure.

A name is free; `base`, `untrained`, `control` and `extended` have a meaning for the conclusions. The control without a
needle (`no_needle`) is evaluated beside the tasks but is none: nothing is concluded from its answers but the chance
level, so it is kept apart wherever arms are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.statistics import PairedComparison, compare_paired
from ctxext.evaluation.store import SampleResult

NEEDLE_TASK = "needle"
CONTROL_TASK = "no_needle"
NOISE = "noise"
# Folders of a run that are not named like their arm.
ARM_FOLDERS = {"base": "before", "extended": "after"}

ArmName = str
Keep = Callable[[SampleResult], bool]


@dataclass(frozen=True)
class Arm:
    """One way of treating the model, evaluated on prompts that other arms share.

    Attributes:
        name: what the conclusions know it by (base, untrained, control, extended), or any other.
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

    @property
    def tasks(self) -> list[str]:
        """The tasks in the order of their first samples."""
        return list(dict.fromkeys(sample.task for sample in self.samples))

    @property
    def answer_tokens(self) -> int:
        """Room for the longest answer, as the stored identity says; 0 where it does not."""
        identity = self.run.get("identity", {})
        budgets = [task.get("max_new_tokens") for task in (identity.get("tasks") or {}).values()]
        return max((int(tokens) for tokens in [identity.get("max_new_tokens"), *budgets] if tokens), default=0)

    def of_task(self, task: str) -> Arm:
        """The same arm with the samples of one task."""
        return replace(self, samples=[sample for sample in self.samples if sample.task == task])

    def is_control_task(self, task: str) -> bool:
        """Whether a task is the control without a needle."""
        return bool(self._task_identity(task).get("task", task) == CONTROL_TASK)

    def is_saliency(self, task: str) -> bool:
        """Whether a task's text is repeated noise: what stands out of it is found by saliency, not by retrieval."""
        whole = self.run.get("identity", {}).get("haystack")
        return bool(self._task_identity(task).get("haystack", whole) == NOISE)

    def _task_identity(self, task: str) -> dict[str, Any]:
        tasks: dict[str, Any] = self.run.get("identity", {}).get("tasks") or {}
        identity: dict[str, Any] = tasks.get(task) or {}
        return identity

    def pairs_with(self, other: Arm, keep: Keep = lambda sample: True) -> list[tuple[SampleResult, SampleResult]]:
        """The samples of both arms on the same prompt, scored in both, in this arm's order."""
        theirs = {sample.prompt_sha256: sample for sample in other.scored}
        return [(s, theirs[s.prompt_sha256]) for s in self.scored if keep(s) and s.prompt_sha256 in theirs]


def arm_of_folder(folder: str) -> ArmName:
    """The arm whose samples lie in a folder of this name."""
    return next((arm for arm, name in ARM_FOLDERS.items() if name == folder), folder)


def without_controls(arm: Arm) -> Arm:
    """The arm without the samples that hold no needle."""
    controls = {task for task in arm.tasks if arm.is_control_task(task)}
    return replace(arm, samples=[s for s in arm.samples if s.task not in controls]) if controls else arm


def only_controls(arm: Arm) -> Arm:
    """The arm's samples that hold no needle."""
    return replace(arm, samples=[s for s in arm.samples if arm.is_control_task(s.task)])


def tasks_of(arms: Iterable[Arm]) -> list[str]:
    """All tasks in the order of their first samples, the controls last."""
    controls: dict[str, bool] = {}
    for arm in arms:
        for task in arm.tasks:
            controls[task] = controls.get(task, False) or arm.is_control_task(task)
    return sorted(controls, key=controls.__getitem__)


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


def compare_arms(first: Arm, second: Arm, keep: Keep = lambda sample: True) -> PairedComparison | None:
    """Two arms on the prompts that both answered; None when there is none."""
    pairs = first.pairs_with(second, keep)
    return compare_pairs(pairs) if pairs else None


def compare_pairs(pairs: Sequence[tuple[SampleResult, SampleResult]]) -> PairedComparison:
    """Right answers of two arms to the same prompts, which form clusters by their text."""
    outcomes = [(mine.score >= 1.0, theirs.score >= 1.0) for mine, theirs in pairs]
    return compare_paired(outcomes, [cluster_of(mine) for mine, _ in pairs])


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


@dataclass(frozen=True)
class Coverage:
    """How far a suite reached, beside the target length that it should have reached.

    Attributes:
        longest_tokens: of the longest scored prompt, 0 when none has a score.
        answer_tokens: of the answer that fits behind it.
    """

    longest_tokens: int
    target_length: int
    answer_tokens: int = 0

    @property
    def reached(self) -> bool:
        """Whether the longest prompt and its answer fill the target length."""
        return self.longest_tokens + self.answer_tokens >= self.target_length

    @property
    def sentence(self) -> str | None:
        """What must stand beside every result of a suite that stops short of the target; None when it does not."""
        if self.reached:
            return None
        return (
            f"The longest prompt has {self.longest_tokens:,} of the {self.target_length:,} tokens of the target "
            f"length, so nothing is claimed beyond {self.longest_tokens:,} tokens."
        )

    @property
    def footnote(self) -> str | None:
        """The same in the room of a picture."""
        if self.reached:
            return None
        return (
            f"Tested up to {self.longest_tokens:,} tokens; nothing is claimed up to the target {self.target_length:,}."
        )


def coverage_of(arms: Sequence[Arm], target_length: int, answer_tokens: int = 0) -> Coverage:
    """How far the scored prompts of these arms reach together."""
    longest = max((s.length_tokens for arm in arms for s in without_controls(arm).scored), default=0)
    return Coverage(longest, target_length, answer_tokens)


def coverage_sentence(longest_tokens: int, target_length: int, answer_tokens: int = 0) -> str | None:
    """`Coverage.sentence` from its numbers."""
    return Coverage(longest_tokens, target_length, answer_tokens).sentence
