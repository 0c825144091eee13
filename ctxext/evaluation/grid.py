"""Lengths and depths of a suite, as the user writes them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Depth = Annotated[float, Field(ge=0.0, le=1.0)]


class Block(BaseModel):
    """A strict, frozen part of a suite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RelativeLength(Block):
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


class GridRow(Block):
    """One length with its depths.

    Attributes:
        length: prompt tokens, or `{target: 0.75}` / `{original: 0.5}` of the model's lengths.
        depths: 0 (start) to 1 (end of the context).
        samples: independent prompts a cell.
    """

    length: Annotated[int, Field(ge=32)] | RelativeLength
    depths: Annotated[list[Depth], Field(min_length=1)]
    samples: Annotated[int, Field(ge=1)]
