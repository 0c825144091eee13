"""The `evaluate` metrics give what the evaluator itself scores, through the same functions, and have their cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import pytest

from ctxext.evaluation.scoring import METRICS
from ctxext.files import shipped_directory

FOLDER = shipped_directory("evals") / "metrics"
ANSWERS = [" 1234567.", "12345678", "it is 1234567, I think", "", "7654321 and 1234567", "AMBER-anchor or 7654321"]
EXPECTED = [["1234567"], ["1234567"], ["1234567", "7654321"], ["1234567"], ["1234567"], ["amber-anchor"]]
DISTRACTORS = [["7654321"]] * 4 + [["7654321"], ["7654321"]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return lambda name: evaluate.load(str(FOLDER / f"{name}.py"), cache_dir=str(tmp_path))


def test_every_metric_has_a_module_and_a_card_that_names_its_version() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(METRICS) == {path.stem for path in FOLDER.glob("*.md")}
    for name, metric in METRICS.items():
        assert f"{metric.versioned}." in (FOLDER / f"{name}.md").read_text()


def test_metric_loads_by_path_and_agrees_with_the_evaluator(load: Callable[[str], Any]) -> None:
    metric = load("number_match")
    answers = [" 1234567.", "12345678", "it is 1234567, I think", ""]
    result = metric.compute(predictions=answers, references=["1234567"] * 4)
    assert result["accuracy"] == 0.5
    assert result["wilson_95"] == pytest.approx([0.150, 0.850], abs=1e-3)


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"number_match"}))
def test_modules_score_every_answer_as_the_evaluator_does(load: Callable[[str], Any], name: str) -> None:
    extra = {"distractors": DISTRACTORS} if name == "first_match_all" else {}
    result = load(name).compute(predictions=ANSWERS, references=EXPECTED, **extra)
    own = [METRICS[name].score(*row) for row in zip(ANSWERS, EXPECTED, DISTRACTORS, strict=True)]
    assert result["scores"] == own
    assert result["score"] == pytest.approx(sum(own) / len(own))
    assert 0 < result["score"] < 1
