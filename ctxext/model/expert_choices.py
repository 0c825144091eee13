"""Which experts tokens are sent to, recorded in one forward pass and repeated in another.

Two models whose weights differ by rounding send a token whose scores are nearly equal to different experts, and from
there on their logits differ as those of different models do. With the choices of the one repeated in the other
("routing replay", Ma et al. 2025, arXiv:2510.11370) what is left is continuous in the weights, and can be compared.
Whether the other had reason to choose otherwise is seen from the scores, which are compared too.

Every `topk` counts as a choice, groups of experts and the tokens that sparse attention looks at included: classes
differ in what their routers return, but all of transformers' own choose by it, except PhiMoE and Switch Transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Choice:
    """What one `topk` chose from.

    Attributes:
        scores: [..., N] float32.
        indices: [..., k] of the highest.
    """

    scores: Tensor
    indices: Tensor


class ChoiceRecorder(TorchDispatchMode):
    """Records what a model chooses of itself; with `repeated`, those choices take effect instead, in their order.

    Attributes:
        choices: in the order of the forward pass; with `repeated`, those that the model would have made.
    """

    def __init__(self, repeated: Sequence[Choice] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._repeated = repeated
        self.choices: list[Choice] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The operation, its choice recorded and perhaps replaced."""
        output = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.topk.default:
            return output
        scores, indices = args[0], output[1]
        number = len(self.choices)
        # A copy: what is recorded must not change when the model goes on in place.
        self.choices.append(Choice(scores.detach().to("cpu", torch.float32, copy=True), indices.cpu()))
        if number >= len(self._repeated) or self._repeated[number].indices.shape != indices.shape:
            return output  # `compare_choices` says that they are not the same choices
        indices = self._repeated[number].indices.to(indices.device)
        return scores.gather(args[2] if len(args) > 2 else -1, indices), indices


@dataclass(frozen=True)
class ChoiceDifference:
    """Two models' choices.

    Attributes:
        num_choices: of one token in one layer each.
        num_others: chosen differently.
        largest_score: largest difference of scores, relative to the largest score of the layer; infinite when the
            choices were not from the same things.
    """

    num_choices: int
    num_others: int
    largest_score: float

    def words(self) -> str:
        """For people, after a comparison with repeated choices."""
        return (
            f"every token sent to the same experts ({self.num_others} of {self.num_choices} choices would have been "
            f"others; the scores for experts differ by at most {self.largest_score:.1e} of the largest)"
        )


def compare_choices(actual: Sequence[Choice], expected: Sequence[Choice]) -> ChoiceDifference | None:
    """How two models' own choices and the scores behind them differ; None when neither chose anything."""
    count = sum(choice.indices.shape[:-1].numel() for choice in expected)
    if _shapes(actual) != _shapes(expected):
        return ChoiceDifference(count, count, float("inf"))
    others, largest = 0, 0.0
    for mine, theirs in zip(actual, expected, strict=True):
        chosen, wanted = mine.indices.sort(dim=-1).values, theirs.indices.sort(dim=-1).values
        others += int((chosen != wanted).any(dim=-1).sum())
        largest = max(largest, _relative(mine.scores, theirs.scores))
    return ChoiceDifference(count, others, largest) if expected else None


def _shapes(choices: Sequence[Choice]) -> list[tuple[torch.Size, torch.Size]]:
    return [(choice.scores.shape, choice.indices.shape) for choice in choices]


def _relative(actual: Tensor, expected: Tensor) -> float:
    masked = expected.isinf()  # experts of groups that were not chosen
    if not torch.equal(masked, actual.isinf()):
        return float("inf")
    difference = (actual - expected).masked_fill(masked, 0.0).abs().max()
    relative = float(difference / expected.masked_fill(masked, 0.0).abs().max().clamp(min=1e-30))
    return float("inf") if math.isnan(relative) else relative
