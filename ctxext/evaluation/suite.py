"""What to measure: a declarative suite, resolved into cells and samples for one model's lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ctxext.errors import RecipeError
from ctxext.evaluation.grid import Block, GridRow, RelativeLength
from ctxext.evaluation.haystack import HaystackChoice
from ctxext.evaluation.tasks.base import SPREAD_DEPTH, Task
from ctxext.evaluation.tasks.needle import NeedleTask
from ctxext.evaluation.tasks.registry import AnyTask
from ctxext.recipe.load import apply_overrides, find_shipped, read_document, validate_document

__all__ = ["Cell", "GridRow", "RelativeLength", "Sample", "Suite", "load_suite", "resolve_samples", "stored_suite"]

# Keys that stored suites do not have; left out where they say nothing, so that today's suites read as they always did.
_LATER = ("tasks", "haystacks", "question_first", "answer_prefix", "apply_chat_template", "thinking", "perplexity")


class PerplexityBlock(Block):
    """Perplexity of plain text, measured beside the tasks.

    Attributes:
        window: tokens a sliding window, the context that the model sees at a time; without it every text is read in one
            piece, which gives the loss by position over the whole length.
        stride: by how much the window moves on; only its last `stride` tokens count, in the first window all.
        documents: texts; they do not overlap.
        length: tokens of every text.
        block_tokens: width of the blocks in which the loss is stored.
        haystack: where the texts come from; the suite's own when left out.
    """

    window: Annotated[int, Field(ge=2)] | RelativeLength | None = None
    stride: Annotated[int, Field(ge=1)] | None = None
    documents: Annotated[int, Field(ge=1)] = 4
    length: Annotated[int, Field(ge=2)] | RelativeLength = RelativeLength(target=1.0)
    block_tokens: Annotated[int, Field(ge=1)] = 256
    haystack: HaystackChoice | None = None

    @model_validator(mode="after")
    def _consistent(self) -> PerplexityBlock:
        problems = []
        if (self.window is None) != (self.stride is None):
            problems.append("window and stride belong together")
        if isinstance(self.window, int) and self.stride is not None and self.stride >= self.window:
            problems.append("stride must be smaller than window, or a window's first token has no context")
        if isinstance(self.window, int) and isinstance(self.length, int) and self.window > self.length:
            problems.append("window must not be larger than length")
        if self.haystack == "noise":
            problems.append("noise repeats five sentences; its perplexity says nothing")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, dict | PerplexityBlock) else value


class Suite(Block):
    """Tasks over a grid of lengths and depths.

    Attributes:
        task: `needle`, for a suite of the one task; its wording and answer tokens are the suite's.
        tasks: several tasks with options of their own, instead.
        wording: `ruler` (RULER's single needle, seven digits) or `passkey` (five digits).
        haystack: `python-docs` (documentation topics of this Python), `everyday` (3,500 tokens of plain prose),
            `generated-words`, `noise` (RULER's repeated sentences: saliency, not retrieval), `{text: [files]}` or
            `{dataset: name}`.
        haystacks: `own` for every sample (independent), `paired` (samples of equal index share haystack and needle over
            all depths, for comparisons between depths) or `shared` (one haystack a length, for speed).
        question_first: the question stands before the text instead of behind it.
        answer_prefix: whether the prompt begins the answer, as RULER does; base models need it.
        apply_chat_template: the prompt is a user's turn in the tokenizer's chat template.
        thinking: asked of templates that know `enable_thinking`; then only what follows the thoughts is scored.
        seed: of every haystack, key and value; samples with equal seed and place are equal in all suites.
        loss_block_tokens: width of the blocks in which the loss by position is stored.
        measure_loss: false leaves the loss by position out; with a vocabulary of 262,144 it costs as much as the rest.
        perplexity: perplexity of plain text, measured after the tasks; one measurement or several.
    """

    description: str
    task: Literal["needle"] = "needle"
    tasks: Annotated[list[AnyTask], Field(min_length=1)] | None = None
    wording: Literal["ruler", "passkey"] = "ruler"
    haystack: HaystackChoice = "python-docs"
    haystacks: Literal["own", "paired", "shared"] = "own"
    question_first: bool = False
    answer_prefix: bool = True
    apply_chat_template: bool = False
    thinking: bool = False
    grid: Annotated[list[GridRow], Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 16
    loss_block_tokens: Annotated[int, Field(ge=1)] = 256
    measure_loss: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    perplexity: Annotated[list[PerplexityBlock] | None, BeforeValidator(_listed)] = None

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        problems = []
        if self.tasks is not None:
            if self.wording != "ruler" or self.max_new_tokens != 16:
                problems.append("with tasks, wording and max_new_tokens belong to each task")
            names = [task.cell_name for task in self.tasks]
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                problems.append(f"two tasks have the name {doubled[0]}; give one of them another `name`")
        problems += [
            problem for task in self.tasks or () if (problem := task.grid_problem(task.grid or self.grid)) is not None
        ]
        if self.thinking and not self.apply_chat_template:
            problems.append("thinking needs apply_chat_template: true")
        if not self.answer_prefix and not self.apply_chat_template:
            problems.append("answer_prefix: false needs apply_chat_template: true")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        for key in _LATER:
            if key in values and getattr(self, key) == type(self).model_fields[key].default:
                del values[key]
        return values

    @property
    def members(self) -> list[Task]:
        """The tasks, whether given as a list or as the single needle."""
        if self.tasks is not None:
            return list(self.tasks)
        return [NeedleTask(task=self.task, wording=self.wording, max_new_tokens=self.max_new_tokens)]

    @property
    def num_answer_tokens(self) -> int:
        """The longest answer of any task; every task has the same prompt lengths, so all fit."""
        return max(task.num_answer_tokens for task in self.members)

    def member(self, cell_name: str) -> Task:
        """The task of a cell.

        Raises:
            KeyError: no such task.
        """
        return {task.cell_name: task for task in self.members}[cell_name]


@dataclass(frozen=True, order=True)
class Cell:
    """Task x length x depth."""

    task: str
    length_tokens: int
    depth: float


@dataclass(frozen=True)
class Sample:
    """One question about one prompt; `index` counts within the cell."""

    cell: Cell
    index: int

    @property
    def sample_id(self) -> str:
        """Stable name, also the root of the sample's randomness."""
        return f"{self.cell.task}/{self.cell.length_tokens}/{self.cell.depth:.4f}/{self.index}"


def load_suite(name: str, overrides: Sequence[str] = ()) -> Suite:
    """Load a shipped suite by name or a suite file by path.

    Raises:
        RecipeError: everything that is wrong with it, with line numbers.
    """
    return validate_document(
        apply_overrides(read_document(find_shipped(name, "evals/suites", "suite")), overrides), Suite
    )


def stored_suite(values: Mapping[str, Any]) -> Suite:
    """A suite as plans, reports and folders of samples hold it, with the name that it was asked for."""
    return Suite.model_validate({key: value for key, value in values.items() if key != "name"})


def resolve_samples(suite: Suite, original_length: int, target_length: int) -> list[Sample]:
    """All samples, one of every cell before the second of any, short lengths first: early results cover the grid.

    A task whose evidence lies all over the text has one cell a length, at depth 0.5, with the samples of all depths.

    Raises:
        RecipeError: two rows give the same cell.
    """
    cells: dict[Cell, int] = {}
    order: dict[str, int] = {}
    for number, task in enumerate(suite.members):
        order[task.cell_name] = number
        for cell, samples in _task_cells(suite, task, original_length, target_length):
            if cell in cells and not task.spread:
                raise RecipeError(
                    "suite",
                    [f"suite: grid: the cell length {cell.length_tokens}, depth {cell.depth:g} is given twice"],
                )
            cells[cell] = cells.get(cell, 0) + samples
    ranked = sorted(cells, key=lambda cell: (cell.length_tokens, cell.depth, order[cell.task]))
    return [Sample(cell, index) for index in range(max(cells.values())) for cell in ranked if index < cells[cell]]


def _task_cells(suite: Suite, task: Task, original_length: int, target_length: int) -> Iterator[tuple[Cell, int]]:
    """Cells of one task with their numbers of samples, as the grid gives them."""
    for row in task.grid or suite.grid:
        length = row.length
        if isinstance(length, RelativeLength):
            length = length.tokens(original_length, target_length, suite.num_answer_tokens)
        for depth in row.depths:
            yield Cell(task.cell_name, length, SPREAD_DEPTH if task.spread else depth), row.samples
