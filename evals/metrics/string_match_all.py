"""`string_match_all` as a Hugging Face `evaluate` metric: a thin wrapper over ctxext/evaluation/scoring.py.

metric = evaluate.load("evals/metrics/string_match_all.py")
metric.compute(predictions=["it is 1234567."], references=[["1234567"]])   # {"score": 1.0, "scores": [1.0]}
"""

from ctxext.evaluation import answer_metric
from ctxext.evaluation.scoring import string_match_all


class StringMatchAll(answer_metric.AnswerMetric):
    """Mean over answers; `scores` has every answer's own."""

    description_text = (
        "Share of the expected strings that the answer contains, in lower case, anywhere: RULER's metric for "
        "its retrieval and counting tasks."
    )
    score_answer = staticmethod(string_match_all)
