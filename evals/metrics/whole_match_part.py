"""`whole_match_part` as a Hugging Face `evaluate` metric: a thin wrapper over ctxext/evaluation/scoring.py.

metric = evaluate.load("evals/metrics/whole_match_part.py")
metric.compute(predictions=["it is 1234567."], references=[["1234567"]])   # {"score": 1.0, "scores": [1.0]}
"""

from ctxext.evaluation import answer_metric
from ctxext.evaluation.scoring import whole_match_part


class WholeMatchPart(answer_metric.AnswerMetric):
    """Mean over answers; `scores` has every answer's own."""

    description_text = "Share of answers in which any expected string stands as a whole number or word, in any case."
    score_answer = staticmethod(whole_match_part)
