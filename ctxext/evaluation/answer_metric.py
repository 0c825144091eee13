"""What the modules under evals/metrics share: one of `scoring`'s functions as a Hugging Face `evaluate` metric.

A module there imports this module and not the class from it: `evaluate.load` takes the first metric class it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import datasets
import evaluate

_INPUTS = {
    "predictions": "answers as text.",
    "references": "for each answer, the expected strings.",
    "distractors": "for each answer, wrong answers of the same kind that stood in the text.",
}


class AnswerMetric(evaluate.Metric):  # type: ignore[misc]
    """Mean over answers; `scores` has every answer's own.

    Class attributes:
        description_text: what is scored.
        score_answer: the function of `ctxext.evaluation.scoring`, as a staticmethod.
        columns: its arguments, by their names in `compute`.
    """

    description_text: ClassVar[str]
    score_answer: ClassVar[Callable[..., float]]
    columns: ClassVar[tuple[str, ...]] = ("predictions", "references")

    def _info(self) -> evaluate.MetricInfo:
        strings = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=self.description_text,
            citation="",
            inputs_description="".join(f"\n{name}: {_INPUTS[name]}" for name in self.columns) + "\n",
            features=datasets.Features(
                {name: datasets.Value("string") if name == "predictions" else strings for name in self.columns}
            ),
        )

    def _compute(self, **given: Any) -> dict[str, object]:
        rows = zip(*(given[name] for name in self.columns), strict=True)
        scores = [self.score_answer(*row) for row in rows]
        return {"score": sum(scores) / len(scores), "scores": scores}
