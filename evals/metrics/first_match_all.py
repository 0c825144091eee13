"""`first_match_all` as a Hugging Face `evaluate` metric: a thin wrapper over ctxext/evaluation/scoring.py.

metric = evaluate.load("evals/metrics/first_match_all.py")
metric.compute(predictions=["it is 1234567."], references=[["1234567"]], distractors=[["7654321"]])["score"]   # 1.0
"""

import datasets
import evaluate

from ctxext.evaluation.scoring import first_match_all

_DESCRIPTION = (
    "Share of the expected strings among the first candidates that the answer names, as many as are "
    "expected; candidates are the expected strings and the distractors."
)
_CITATION = ""
_INPUTS = """
predictions: answers as text.
references: for each answer, the expected strings.
distractors: for each answer, wrong answers of the same kind that stood in the text.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class FirstMatchAll(evaluate.Metric):
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
                    "distractors": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], distractors: list[list[str]]
    ) -> dict[str, object]:
        scores = [first_match_all(*row) for row in zip(predictions, references, distractors, strict=True)]
        return {"score": sum(scores) / len(scores), "scores": scores}
