"""`string_match_part` as a Hugging Face `evaluate` metric: a thin wrapper over ctxext/evaluation/scoring.py.

metric = evaluate.load("evals/metrics/string_match_part.py")
metric.compute(predictions=["it is 1234567."], references=[["1234567"]])   # {"score": 1.0, "scores": [1.0]}
"""

from ctxext.evaluation import answer_metric
from ctxext.evaluation.scoring import string_match_part


class StringMatchPart(answer_metric.AnswerMetric):
    """Mean over answers; `scores` has every answer's own."""

    description_text = (
        "Share of answers that contain any of the expected strings, in lower case, anywhere: RULER's metric "
        "for question answering."
    )
    score_answer = staticmethod(string_match_part)
