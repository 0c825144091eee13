"""What a run must reach to count as successful: `evaluation.gates` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ctxext.recipe.base import Block


class GatesBlock(Block):
    """Conditions on the extended arm, checked after the evaluation; one that is not met ends the run with exit code 6.

    Attributes:
        tail: the tail number (retrieval from the last tenth of the positions minus the first) is at least this.
        effective_length: tokens that the needle-effective length (threshold 0.856) reaches.
        short_context_cost: relative increase of the perplexity on short prompts is at most this (0.02 for 2%).
        better_than: right more often than this arm beyond the original length, on the same prompts, at p < 0.05.
        by: `bound` judges by the worse end of the 95% interval, `estimate` by the point estimate; `better_than` is a
            test in any case.
    """

    tail: Annotated[float, Field(ge=-1.0, le=1.0)] | None = None
    effective_length: Annotated[int, Field(gt=0)] | None = None
    short_context_cost: Annotated[float, Field(gt=0.0)] | None = None
    better_than: Annotated[str, Field(min_length=1)] | None = None
    by: Literal["bound", "estimate"] = "bound"

    @model_validator(mode="after")
    def _at_least_one(self) -> GatesBlock:
        if self.tail is None and not (self.effective_length or self.short_context_cost or self.better_than):
            raise ValueError("gates without any gate: name tail, effective_length, short_context_cost or better_than")
        return self
