"""`string_match_part` as a Hugging Face `evaluate` metric: a thin wrapper over ctxext/evaluation/scoring.py.

metric = evaluate.load("evals/metrics/string_match_part.py")
metric.compute(predictions=["it is 1234567."], references=[["1234567"]])   # {"score": 1.0, "scores": [1.0]}
"""

import datasets
import evaluate

from ctxext.evaluation.scoring import string_match_part

_DESCRIPTION = (
    "Share of answers that contain any of the expected strings, in lower case, anywhere: RULER's metric "
    "for question answering."
)
_CITATION = ""
_INPUTS = """
predictions: answers as text.
references: for each answer, the expected strings.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class StringMatchPart(evaluate.Metric):
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
        scores = [string_match_part(*row) for row in zip(predictions, references, strict=True)]
        return {"score": sum(scores) / len(scores), "scores": scores}
