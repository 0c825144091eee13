"""What the evaluator asks of whatever answers prompts: a model in this process, or a server elsewhere.

Prompts are token ids and answers are greedy, so that every backend is asked the same. `Answerer` is the backend of a
model in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ctxext.evaluation.prompt import Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """Greedy continuation of a prompt.

    Attributes:
        losses: the prompt's own next-token losses [S - 1] ([0] when not measured).
        facts: what else the backend has to say, for the stored sample.
    """

    ids: list[int]
    losses: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Work:
    """What was computed: `num_prefilled` of `num_prompt_tokens`, and answer tokens verified without a pass each."""

    num_prompt_tokens: int = 0
    num_prefilled: int = 0
    num_answer_tokens: int = 0
    num_verified: int = 0


@dataclass(frozen=True)
class SelfCheck:
    """What came out when one prompt of the run was answered once more, in another way.

    Attributes:
        sample_id: of the prompt.
        outcome: `tie` when the answers part where the two best tokens are as good as equal.
        reason: why it was not run.
        num_tokens: of the other answer.
        first_difference: index of the first other token.
        margin: how much better the other way found its token there (a difference of logits).
        other: what the engine was compared with.
    """

    sample_id: str
    outcome: Literal["identical", "tie", "different", "not run"]
    reason: str = ""
    num_tokens: int = 0
    first_difference: int | None = None
    margin: float | None = None
    other: str = "plain generate"

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the engine."""
        return self.outcome != "different"

    def summary(self) -> str:
        """One sentence."""
        if self.outcome == "not run":
            return f"self-check not run: {self.reason}"
        if self.outcome == "identical":
            return f"self-check: {self.num_tokens} answer tokens equal {self.other}'s ({self.sample_id})"
        apart = "" if self.margin is None else f", {self.margin:.2g} apart"
        where = f"token {self.first_difference} of {self.sample_id}{apart}"
        return f"self-check: {'a tie' if self.outcome == 'tie' else f'NOT what {self.other} answers'} at {where}"


class NoAnswerError(Exception):
    """A backend cannot answer a prompt; the sample is stored as missing and the evaluation goes on.

    Memory that is full is said with `torch.OutOfMemoryError` instead, which longer prompts need not try again.

    Args:
        reason: for people, one sentence without a full stop.
        status: of the stored sample.
    """

    def __init__(self, reason: str, *, status: str = "rejected") -> None:
        self.reason = reason
        self.status = status
        super().__init__(reason)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by a device, by PyTorch's allocator on the CPU, or by Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


class Backend(Protocol):
    """Answers prompts greedily.

    Attributes:
        tokenizer: of the model; it made the prompts.
        work: what was computed so far.
    """

    tokenizer: Any
    work: Work

    def batch_size(self, length_tokens: int) -> int:
        """How many prompts of this length `answer_together` takes at a time."""

    def reason_against_sharing(self, longest_tokens: int) -> str | None:
        """Why prompts of up to so many tokens (answer included) cannot share a beginning; None when they can."""

    def answer_together(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        measure_loss: bool = True,
        hoped_for: Sequence[Sequence[int]] = (),
    ) -> list[Answer]:
        """Answers to prompts of equal length, each as if it were alone.

        Args:
            hoped_for: an answer for every prompt that greedy decoding may begin with; decides nothing but the time.

        Raises:
            torch.OutOfMemoryError: together they need more memory than there is.
            NoAnswerError: one of them cannot be answered; when there are several, they are asked again in parts.
        """

    def answer_sharing(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        measure_loss: bool = True,
        hoped_for: Sequence[Sequence[int]] = (),
    ) -> Iterator[tuple[int, Answer]]:
        """The index of a prompt and its answer, as they come; tokens that several prompts begin with run once.

        Asked only where there is no `reason_against_sharing`; raises as `answer_together` does.
        """

    def kernels(self) -> list[str]:
        """The attention kernels of a prefill; empty when they are not known or none ran."""

    def self_check(self, prompt: Prompt, answer: Answer) -> SelfCheck:
        """Answer a prompt of the run in another way and compare."""

    def identity(self) -> dict[str, Any]:
        """What determines the answers besides the weights; stored samples are reused only where it is the same."""


def batches(backend: Backend, items: Sequence[T], length_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Neighbours whose prompts are equally long, in the given order, as many at a time as the backend takes."""
    for length, group in groupby(items, key=length_of):
        alike, size = list(group), backend.batch_size(length)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))
