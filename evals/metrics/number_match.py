"""`number_match` as a Hugging Face `evaluate` metric: a thin wrapper over ctxext/evaluation/scoring.py.

metric = evaluate.load("evals/metrics/number_match.py")
metric.compute(predictions=["it is 1234567."], references=["1234567"])   # {"accuracy": 1.0, "wilson_95": [...]}
"""

import datasets
import evaluate

from ctxext.evaluation.scoring import number_match
from ctxext.evaluation.statistics import wilson

_DESCRIPTION = "Share of answers that contain the expected number as a whole number, with a Wilson 95% interval."
_CITATION = ""
_INPUTS = """
predictions: answers as text.
references: the expected numbers as text.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class NumberMatch(evaluate.Metric):
    """Retrieval accuracy of needle answers."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, object]:
        scores = [number_match(answer, expected) for answer, expected in zip(predictions, references, strict=True)]
        share = wilson(sum(score >= 1.0 for score in scores), len(scores))
        return {"accuracy": share.value, "wilson_95": [share.low, share.high]}
