"""What becomes of a step whose loss or gradient is not finite: the end of the training, or a step without update."""

from __future__ import annotations

from typing import Literal

from ctxext.errors import DivergedError
from ctxext.train.step import StepResult

_MOST_IN_A_ROW = 3


class NonFinitePolicy:
    """`train.non_finite`: `stop`, or `skip` at most three steps in a row.

    A skipped step counts like any other: its windows are consumed and the learning rate goes on.

    Attributes:
        in_a_row: skipped steps up to now, since the last one that was done.
    """

    def __init__(self, choice: Literal["stop", "skip"]) -> None:
        self._choice = choice
        self.in_a_row = 0

    def judge(self, result: StepResult, step: int) -> str | None:
        """What to tell people about the step (counted from 1); None for one that was done.

        Raises:
            DivergedError: the training has to end; parameters are as before the step.
        """
        if result.skipped is None:
            self.in_a_row = 0
            return None
        if self._choice == "stop":
            raise DivergedError(
                f"step {step} gave a value that is not finite; nothing was changed by it",
                where="train",
                got=result.skipped,
                hint="The last checkpoint is untouched; lower train.learning_rate, look at the data of this step, or "
                "leave such steps out with train.non_finite=skip.",
            )
        self.in_a_row += 1
        if self.in_a_row > _MOST_IN_A_ROW:
            raise DivergedError(
                f"step {step} is the {self.in_a_row}th in a row whose loss or gradient is not finite",
                where="train",
                got=result.skipped,
                expected=f"at most {_MOST_IN_A_ROW} in a row with train.non_finite: skip",
                hint="The last checkpoint is untouched; lower train.learning_rate or look at the data of these steps.",
            )
        return f"step {step} skipped, nothing was updated: {result.skipped} (at most {_MOST_IN_A_ROW} in a row)"
