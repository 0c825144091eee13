"""Evaluation during training, before any work: what it asks, what it costs, and whether it can decide anything."""

from __future__ import annotations

from ctxext.errors import UsageError
from ctxext.evaluation.arms import CONTROL_TASK
from ctxext.evaluation.suite import Sample, Suite, load_suite, resolve_samples
from ctxext.recipe.train import TrainBlock


def deciding_samples(suite: Suite, original_length: int, target_length: int) -> list[Sample]:
    """The samples by which the best checkpoint is chosen: those with a needle, beyond the original length."""
    controls = {task.cell_name for task in suite.members if task.task_name == CONTROL_TASK}
    return [
        sample
        for sample in resolve_samples(suite, original_length, target_length)
        if sample.cell.task not in controls and sample.cell.length_tokens > original_length
    ]


def evaluated_steps(train: TrainBlock) -> list[int]:
    """The steps after which the model is evaluated, when training does not end before."""
    if train.evaluate is None:
        return []
    return sorted({*range(train.evaluate.every, train.steps + 1, train.evaluate.every), train.steps})


def periodic_suite(train: TrainBlock, original_length: int, target_length: int) -> Suite | None:
    """The suite of the evaluations during training; None where there are none.

    Raises:
        RecipeError: no such suite, or a wrong one.
        UsageError: one that cannot tell a better checkpoint from a worse one.
    """
    if train.evaluate is None:
        return None
    suite = load_suite(train.evaluate.suite)
    if not deciding_samples(suite, original_length, target_length):
        raise UsageError(
            "this suite has no needle beyond the original length, so it could not choose the best checkpoint",
            where="train.evaluate.suite",
            got=train.evaluate.suite,
            expected=f"lengths above {original_length:,} tokens",
        )
    return suite
