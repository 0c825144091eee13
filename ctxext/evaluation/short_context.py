"""What extension cost on short prompts: the loss of both models on the same prompts, as an upper bound.

The number to look at is the upper end: a cost that was measured on three prompts is not small because its mean is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.conclusions import Arm, mean_loss
from ctxext.evaluation.statistics import MeanDifference, counted, paired_difference


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
        return math.expm1(self.difference.mean)

    @property
    def perplexity_bound(self) -> float:
        """Upper end of the 95% interval of the relative increase; infinite for a single prompt."""
        return math.inf if math.isinf(self.difference.high) else math.expm1(self.difference.high)

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
