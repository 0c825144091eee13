"""Every task by its name, for suites and `ctxext list tasks`."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from ctxext.evaluation.tasks.aggregate import CommonWordsTask, FrequentWordsTask, VariableTrackingTask
from ctxext.evaluation.tasks.base import Task
from ctxext.evaluation.tasks.cloze import ClozeTask
from ctxext.evaluation.tasks.key_value import KeyValueTask
from ctxext.evaluation.tasks.needle import NeedleSweepTask, NeedleTask, NoNeedleTask
from ctxext.evaluation.tasks.no_overlap import NoOverlapTask
from ctxext.evaluation.tasks.qa import QaTask

AnyTask = Annotated[
    NeedleTask
    | NeedleSweepTask
    | NoNeedleTask
    | VariableTrackingTask
    | CommonWordsTask
    | FrequentWordsTask
    | QaTask
    | KeyValueTask
    | NoOverlapTask
    | ClozeTask,
    Field(discriminator="task"),
]

TASKS: dict[str, type[Task]] = {
    get_args(kind.model_fields["task"].annotation)[0]: kind for kind in get_args(get_args(AnyTask)[0])
}
