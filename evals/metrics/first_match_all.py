"""`first_match_all` as a Hugging Face `evaluate` metric: a thin wrapper over ctxext/evaluation/scoring.py.

metric = evaluate.load("evals/metrics/first_match_all.py")
metric.compute(predictions=["it is 1234567."], references=[["1234567"]], distractors=[["7654321"]])["score"]   # 1.0
"""

from ctxext.evaluation import answer_metric
from ctxext.evaluation.scoring import first_match_all


class FirstMatchAll(answer_metric.AnswerMetric):
    """Mean over answers; `scores` has every answer's own."""

    description_text = (
        "Share of the expected strings among the first candidates that the answer names, as many as are "
        "expected; candidates are the expected strings and the distractors."
    )
    score_answer = staticmethod(first_match_all)
    columns = ("predictions", "references", "distractors")
