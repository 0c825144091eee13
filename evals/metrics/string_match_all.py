"""`string_match_all` as a Hugging Face `evaluate` metric: a thin wrapper over ctxext/evaluation/scoring.py.

metric = evaluate.load("evals/metrics/string_match_all.py")
metric.compute(predictions=["it is 1234567."], references=[["1234567"]])   # {"score": 1.0, "scores": [1.0]}
"""

import datasets
import evaluate

from ctxext.evaluation.scoring import string_match_all

_DESCRIPTION = (
    "Share of the expected strings that the answer contains, in lower case, anywhere: RULER's metric for "
    "its retrieval and counting tasks."
)
_CITATION = ""
_INPUTS = """
predictions: answers as text.
references: for each answer, the expected strings.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class StringMatchAll(evaluate.Metric):
    """Mean over answers; `scores` has every answer's own."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, object]:
        scores = [string_match_all(*row) for row in zip(predictions, references, strict=True)]
        return {"score": sum(scores) / len(scores), "scores": scores}
