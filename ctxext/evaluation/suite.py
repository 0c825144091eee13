"""What to measure: a declarative suite, resolved into cells and samples for one model's lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ctxext.errors import RecipeError
from ctxext.recipe.load import apply_overrides, find_shipped, read_document, validate_document

Depth = Annotated[float, Field(ge=0.0, le=1.0)]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RelativeLength(_Block):
    """A length as a share of the model's target or original length; the answer's tokens fit inside as well."""

    target: Annotated[float, Field(gt=0, le=1)] | None = None
    original: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> RelativeLength:
        if (self.target is None) == (self.original is None):
            raise ValueError("a relative length has exactly one of target and original")
        return self

    def tokens(self, original_length: int, target_length: int, max_new_tokens: int) -> int:
        """Prompt tokens such that prompt and answer together reach the share."""
        whole = self.target * target_length if self.target is not None else (self.original or 0.0) * original_length
        return int(whole) - max_new_tokens


class GridRow(_Block):
    """One length with its depths.

    Attributes:
        length: prompt tokens, or `{target: 0.75}` / `{original: 0.5}` of the model's lengths.
        depths: 0 (start) to 1 (end of the context).
        samples: independent prompts a cell.
    """

    length: Annotated[int, Field(ge=32)] | RelativeLength
    depths: Annotated[list[Depth], Field(min_length=1)]
    samples: Annotated[int, Field(ge=1)]


class Suite(_Block):
    """A needle grid.

    Attributes:
        task: `needle`.
        wording: `ruler` (RULER's single needle, seven digits) or `passkey` (five digits).
        haystack: `python-docs` (documentation topics of this Python) or `generated-words`.
        seed: of every haystack, key and value; samples with equal seed and place are equal in all suites.
        loss_block_tokens: width of the blocks in which the loss by position is stored.
        measure_loss: false leaves the loss by position out; with a vocabulary of 262,144 it costs as much as the rest.
    """

    description: str
    task: Literal["needle"] = "needle"
    wording: Literal["ruler", "passkey"] = "ruler"
    haystack: Literal["python-docs", "generated-words"] = "python-docs"
    grid: Annotated[list[GridRow], Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1, le=512)] = 16
    loss_block_tokens: Annotated[int, Field(ge=1)] = 256
    measure_loss: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


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


def resolve_samples(suite: Suite, original_length: int, target_length: int) -> list[Sample]:
    """All samples, one of every cell before the second of any, short lengths first: early results cover the grid.

    Raises:
        RecipeError: two rows give the same cell.
    """
    rows: list[tuple[int, float, int]] = []
    for row in suite.grid:
        length = row.length
        if isinstance(length, RelativeLength):
            length = length.tokens(original_length, target_length, suite.max_new_tokens)
        rows += [(length, depth, row.samples) for depth in row.depths]
    cells = [(length, depth) for length, depth, _ in rows]
    if len(set(cells)) != len(cells):
        doubled = next(cell for cell in cells if cells.count(cell) > 1)
        raise RecipeError("suite", [f"suite: grid: the cell length {doubled[0]}, depth {doubled[1]:g} is given twice"])
    rounds = max(samples for _, _, samples in rows)
    return [
        Sample(Cell(suite.task, length, depth), index)
        for index in range(rounds)
        for length, depth, samples in sorted(rows)
        if index < samples
    ]
