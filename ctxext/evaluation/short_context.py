"""What extension cost on short prompts: the loss of both models on the same prompts, as an upper bound.

The number to look at is the upper end: a cost that was measured on three prompts is not small because its mean is.
Prompts that resemble the training text can hide a cost, so `short_guard` also compares short texts of another domain,
and the answers to the short tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ctxext.evaluation.arms import Arm, compare_arms, mean_loss
from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.perplexity import PerplexityDifference, PerplexityResult, compare_perplexity, relative_increase
from ctxext.evaluation.statistics import MeanDifference, PairedComparison, counted, paired_difference
from ctxext.evaluation.store import SampleResult


@dataclass(frozen=True)
class ShortContextCost:
    """Relative increase of perplexity and of loss, paired by prompt.

    Attributes:
        difference: of the loss in nats, extended minus base, with its 95% t interval.
        base_loss: mean loss of the base model on these prompts, in nats.
    """

    length_tokens: int
    difference: MeanDifference
    base_loss: float

    @property
    def perplexity_increase(self) -> float:
        """Relative increase of the perplexity, 0.02 for 2%."""
        return relative_increase(self.difference.mean)

    @property
    def perplexity_bound(self) -> float:
        """Upper end of the 95% interval of the relative increase; infinite for a single prompt."""
        return relative_increase(self.difference.high)

    @property
    def loss_bound(self) -> float:
        """Upper end of the relative increase of the loss, the base model's loss taken as it was measured."""
        return self.difference.high / self.base_loss

    def text(self) -> str:
        """One sentence."""
        bound = self.perplexity_bound
        worst = "no upper bound from so few" if math.isinf(bound) else f"at most {bound:+.1%} by the upper 95% bound"
        clusters = self.difference.num_clusters
        of = f" of {counted(clusters, 'haystack')}" if clusters is not None else ""
        return (
            f"Short-context cost at {self.length_tokens:,} tokens: perplexity {self.perplexity_increase:+.1%}, {worst} "
            f"({counted(self.difference.num_pairs, 'prompt')}{of}, the same for both models)."
        )


def short_context_cost(after: Arm, before: Arm, *, original_length: int) -> ShortContextCost | None:
    """The cost at the shortest length inside the original one; None where no prompt has losses in both arms."""
    inside = [s.length_tokens for s in before.scored if s.length_tokens <= original_length and s.loss_blocks]
    shortest = min(inside, default=0)
    pairs = after.pairs_with(before, lambda sample: sample.length_tokens == shortest)
    losses = [
        (new, old, cluster_of(mine))
        for mine, theirs in pairs
        if (new := mean_loss(mine)) is not None and (old := mean_loss(theirs)) is not None
    ]
    if not losses:
        return None
    difference = paired_difference([new - old for new, old, _ in losses], [cluster for _, _, cluster in losses])
    return ShortContextCost(shortest, difference, math.fsum(old for _, old, _ in losses) / len(losses))


@dataclass(frozen=True)
class ShortGuard:
    """What extension cost on short prompts and texts, everything paired.

    Attributes:
        prompts: by the loss of the prompts; None where no prompt has losses in both arms.
        texts: by the perplexity of plain text, with the haystack that it came from; None where none was measured.
        tasks: answers before and after (`first` is after), by task.
    """

    prompts: ShortContextCost | None
    texts: PerplexityDifference | None
    haystack: str
    tasks: dict[str, PairedComparison] = field(default_factory=dict)

    @property
    def bound(self) -> float | None:
        """Upper end of the relative increase of the perplexity: the larger one of texts and prompts; None for none."""
        found = [self.prompts.perplexity_bound] if self.prompts is not None else []
        found += [self.texts.increase_95[1]] if self.texts is not None else []
        return max(found, default=None)

    def sentences(self, after: str, before: str) -> list[str]:
        """What was found, the bound first."""
        lines = []
        if self.bound is not None:
            bound = "has no upper bound" if math.isinf(self.bound) else f"is at most {self.bound:+.1%}"
            lines.append(
                f"Short-context cost of {after} against {before}: the perplexity's increase {bound} (upper 95%)."
            )
        if self.texts is not None:
            lines.append(f"Short texts of {self.haystack}: {self.texts.sentence(after, before)}")
        if self.prompts is not None:
            lines.append(self.prompts.text())
        for task, found in self.tasks.items():
            lines.append(
                f"{task}: {after} {found.first.text()}, {before} {found.second.text()}: {found.verdict(after, before)}."
            )
        return lines


def short_guard(
    after: Arm,
    before: Arm,
    *,
    original_length: int,
    after_texts: Sequence[PerplexityResult] = (),
    before_texts: Sequence[PerplexityResult] = (),
) -> ShortGuard:
    """Compare two arms on short prompts and short texts.

    Args:
        after_texts, before_texts: what `load_perplexity` returns for the two arms; the first measurement inside the
            original length that both have counts.
    """
    texts, haystack = None, ""
    for mine in after_texts:
        if (mine.window_tokens or mine.length_tokens) > original_length:
            continue
        alike = [one for one in before_texts if (one.kind, one.window_tokens) == (mine.kind, mine.window_tokens)]
        texts = next((found for one in alike if (found := compare_perplexity(mine, one)) is not None), None)
        haystack = mine.haystack
        if texts is not None:
            break
    tasks = {}
    for name in sorted({sample.task for sample in after.scored}):
        answers = compare_arms(after, before, _short_sample(name, original_length))
        if answers is not None:
            tasks[name] = answers
    return ShortGuard(
        short_context_cost(after, before, original_length=original_length), texts, haystack if texts else "", tasks
    )


def _short_sample(task: str, original_length: int) -> Callable[[SampleResult], bool]:
    return lambda sample: sample.task == task and sample.length_tokens <= original_length
