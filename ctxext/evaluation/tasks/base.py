"""What a task is: options in a suite, and a sample drawn from them as texts that the prompt builder makes token-exact.

A task never counts tokens while it draws. It says what stands before and after the text (`Draft`), what goes into the
text and where (`Item`), and which body fills the remaining room exactly (`Body`). Nothing is truncated that could hold
an answer, nothing is drawn again until it fits, and equal seeds give equal samples whatever was drawn before.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from ctxext.data.boundaries import SentenceEnds
from ctxext.evaluation.grid import Block, GridRow
from ctxext.evaluation.haystack import Encode, HaystackChoice
from ctxext.files import canonical_json

MetricName = Literal[
    "number_match",
    "string_match_all",
    "string_match_part",
    "whole_match_all",
    "whole_match_part",
    "first_match_all",
]
# Said about tasks whose evidence is spread over the text: the mean depth of evenly spread places.
SPREAD_DEPTH = 0.5


@dataclass(frozen=True)
class Item:
    """Something that is placed into the text.

    Attributes:
        depth: 0 is the start of the text, 1 its end.
        asked: whether the question is about it; distractors are not asked.
    """

    text: str
    depth: float
    asked: bool = True


@dataclass(frozen=True)
class Span:
    """Where an item stands: token indices `start` (included) to `end` (excluded)."""

    start: int
    end: int
    asked: bool

    def moved(self, offset: int) -> Span:
        """The same span counted from `offset` tokens earlier."""
        return Span(self.start + offset, self.end + offset, self.asked)


@dataclass(frozen=True)
class Kit:
    """What a body needs to become token ids.

    Attributes:
        encode: text to ids without special tokens.
        ends: where sentences end in ids.
        haystack: the first n ids of the sample's own haystack.
        padding: id of a line break (or of what is nearest to it), which fills rests that no unit fits into.
        seed: root of the randomness of fillers.
    """

    encode: Encode
    ends: SentenceEnds
    haystack: Callable[[int], list[int]]
    padding: int
    seed: str


@dataclass(frozen=True)
class Filled:
    """A body as ids.

    Attributes:
        position: where the first asked item begins, or would begin if there were one.
        haystack: the haystack's ids alone; None where the text is generated for the sample.
    """

    ids: list[int]
    spans: tuple[Span, ...]
    position: int
    haystack: list[int] | None


class NoRoomError(ValueError):
    """A body needs `needed` tokens and has fewer."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        super().__init__(f"{needed} tokens needed")


class Body(Protocol):
    """The long part of a prompt."""

    def fill(self, room: int, kit: Kit) -> Filled:
        """Exactly `room` token ids.

        Raises:
            NoRoomError: what must stand in the text does not fit.
        """


@dataclass(frozen=True)
class Draft:
    """One sample as texts.

    Attributes:
        intro: before the text, worked examples included.
        question: what is asked, behind the text or (`question_first`) before it.
        answer_prefix: how the answer begins; the model goes on from there.
        answers: the expected answers; whether all or any count is the metric's business.
        distractors: wrong answers of the same kind that stand in the text (or would in a longer one).
        key: what the question names.
        questions: every question about the same text, with its answer prefix, where there are several; the text is then
            made as long as the longest of them allows, and goes on a few tokens further for the others.
        facts: further facts worth recording.
    """

    intro: str
    question: str
    answer_prefix: str
    body: Body
    answers: tuple[str, ...]
    distractors: tuple[str, ...] = ()
    key: str = ""
    questions: tuple[tuple[str, str], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


class Task(Block, ABC):
    """A task of a suite; subclasses add `task` (a Literal, the registry's key) and their options.

    Attributes:
        name: of the task's cells; the task's own name by default. Two variants of a task need two names.
        haystack: the suite's by default.
        grid: the suite's by default.
        max_new_tokens: answer tokens; the task's own `budget` by default.
        question_first: question before the text; the suite's by default.
        metric: what decides right or wrong; every other metric that makes sense is reported beside it.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")] | None = None
    haystack: HaystackChoice | None = None
    grid: Annotated[list[GridRow], Field(min_length=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] | None = None
    question_first: bool | None = None
    metric: MetricName | None = None

    summary: ClassVar[str]
    when: ClassVar[str]
    source: ClassVar[str]
    budget: ClassVar[int] = 32
    usual_metric: ClassVar[MetricName] = "whole_match_all"

    @abstractmethod
    def draft(self, rng: random.Random, length_tokens: int, depth: float) -> Draft:
        """Draw one sample for a prompt of `length_tokens`.

        Raises:
            UsageError: the task has no sample of this length.
        """

    @property
    def task_name(self) -> str:
        """The registry's key."""
        return str(getattr(self, "task"))  # noqa: B009

    @property
    def cell_name(self) -> str:
        """The task's name in cells and samples."""
        return self.name or self.task_name

    @property
    def spread(self) -> bool:
        """Whether the evidence lies all over the text, so that a grid of depths has no meaning."""
        return False

    @property
    def one_text(self) -> bool:
        """Whether the samples of equal length and index are questions about one text, whatever their depth."""
        return False

    def grid_problem(self, rows: Sequence[GridRow]) -> str | None:
        """Why the task cannot be asked at these depths; None when it can."""
        return None

    @property
    def own_haystack(self) -> HaystackChoice | None:
        """The haystack to read instead of the suite's."""
        return self.haystack

    @property
    def num_answer_tokens(self) -> int:
        """How long an answer may get."""
        return self.max_new_tokens or self.budget

    @property
    def metric_name(self) -> str:
        """The metric that decides."""
        return self.metric or self.usual_metric

    @property
    def variant(self) -> str:
        """Root of the samples' randomness: the options that change what is drawn, and no others.

        Where the question stands or how long an answer may get changes nothing, so such arms see equal samples.
        """
        changed = self.model_dump(mode="json", exclude=_NOT_DRAWN, exclude_defaults=True)
        return canonical_json({"task": self.task_name, **changed})

    def fingerprints(self) -> dict[str, str]:
        """Hashes of files that the samples are drawn from."""
        return {}


_NOT_DRAWN = {"name", "haystack", "grid", "max_new_tokens", "question_first", "metric"}
