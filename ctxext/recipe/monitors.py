"""What is watched while training: `train.monitors` and `train.evaluate` of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ctxext.recipe.base import Block, PositiveInt


class MonitorsBlock(Block):
    """What is watched, and how often.

    Attributes:
        attention_every: steps from one look at attention entropies and long-range shares to the next; a tenth of the
            training when left out, 0 for never.
    """

    attention_every: Annotated[int, Field(ge=0)] | None = None


class PeriodicBlock(Block):
    """A small evaluation while training; the best checkpoint by it is kept, and merged.

    Attributes:
        every: steps from one to the next.
        suite: name of a shipped suite or path of one; small, for every process waits for it.
        stop_after: end the training after so many evaluations without a better one.
    """

    every: PositiveInt
    suite: str = "during-training"
    stop_after: PositiveInt | None = None
