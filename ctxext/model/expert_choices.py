"""Which experts tokens are sent to, recorded in one forward pass and repeated in another.

Two models whose weights differ by rounding send a token whose scores are nearly equal to different experts, and from
there on their logits differ as those of different models do. With the choices of the one repeated in the other
("routing replay", Ma et al. 2025, arXiv:2510.11370) what is left is continuous in the weights, and can be compared.
Whether the other had reason to choose otherwise is seen from the scores, which are compared too.

Every `topk` counts as a choice, groups of experts and the tokens that sparse attention looks at included: classes
differ in what their routers return, but nearly all of transformers' own choose by it. PhiMoE's chooses otherwise, and
drops experts beyond a threshold from the weights as well: of such routers everything but the scores is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ctxext.model.routers import Router, routers_of


@dataclass(frozen=True)
class Choice:
    """What one `topk` chose from.

    Attributes:
        scores: [..., N] float32.
        indices: [..., k] of the highest.
        outputs: of a router that chose in another way than by `topk`, all that it returned.
    """

    scores: Tensor
    indices: Tensor
    outputs: tuple[Tensor, ...] = ()


class ChoiceRecorder(TorchDispatchMode):
    """Records what a model chooses of itself; with `repeated`, those choices take effect instead, in their order.

    Made by `choices_recorded`, which also puts it at the model's routers.

    Attributes:
        choices: in the order of the forward pass; with `repeated`, those that the model would have made.
    """

    def __init__(self, repeated: Sequence[Choice] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._repeated = repeated
        self.choices: list[Choice] = []
        self._before_router = 0

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

    def before_router(self, module: nn.Module, given: Any) -> None:
        """Forward pre-hook of a router."""
        self._before_router = len(self.choices)

    def after_router(self, router: Router, module: nn.Module, given: Any, output: Any) -> tuple[Tensor, ...] | None:
        """Forward hook: routers that chose, but not by `topk`, are recorded and repeated here."""
        number = len(self.choices)
        if number > self._before_router or not isinstance(output, tuple) or not any(map(_is_index, output)):
            return None
        scores, indices = router.logits(output).to("cpu", torch.float32, copy=True), router.chosen(output, 0).cpu()
        self.choices.append(Choice(scores, indices, tuple(part.cpu() for part in output)))
        repeated = self._repeated[number].outputs if number < len(self._repeated) else ()
        if [part.shape for part in repeated] != [part.shape for part in output]:
            return None
        pairs = enumerate(zip(output, repeated, strict=True))
        return tuple(mine if place == router.index else theirs.to(mine) for place, (mine, theirs) in pairs)


@contextmanager
def choices_recorded(model: nn.Module, repeated: Sequence[Choice] = ()) -> Iterator[list[Choice]]:
    """Inside, one forward pass of `model` fills the list with its choices, and makes those of `repeated` instead."""
    recorder = ChoiceRecorder(repeated)
    handles: list[RemovableHandle] = []
    for router in routers_of(model):
        handles.append(router.module.register_forward_pre_hook(recorder.before_router))
        handles.append(router.module.register_forward_hook(partial(recorder.after_router, router)))
    try:
        with recorder:
            yield recorder.choices
    finally:
        for handle in handles:
            handle.remove()


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


def _is_index(part: Any) -> bool:
    return isinstance(part, Tensor) and not part.is_floating_point() and part.dtype != torch.bool


def _shapes(choices: Sequence[Choice]) -> list[tuple[torch.Size, torch.Size]]:
    return [(choice.scores.shape, choice.indices.shape) for choice in choices]


def _relative(actual: Tensor, expected: Tensor) -> float:
    masked = expected.isinf()  # experts of groups that were not chosen
    if not torch.equal(masked, actual.isinf()):
        return float("inf")
    difference = (actual - expected).masked_fill(masked, 0.0).abs().max()
    relative = float(difference / expected.masked_fill(masked, 0.0).abs().max().clamp(min=1e-30))
    return float("inf") if math.isnan(relative) else relative
