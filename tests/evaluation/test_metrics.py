"""The `evaluate` metrics give what the evaluator itself scores, through the same functions, and have their cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import pytest

from ctxext.evaluation.effective_length import RULER_TASKS
from ctxext.evaluation.ruler_file import ruler_metric
from ctxext.evaluation.scoring import BESIDE, METRICS
from ctxext.evaluation.tasks.registry import TASKS
from ctxext.files import read_json, shipped_directory

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


def test_every_metric_that_results_name_loads_by_path(load: Callable[[str], Any]) -> None:
    used = {name for deciding in BESIDE for name in (deciding, *BESIDE[deciding])}
    used |= {ruler_metric(task) for task in RULER_TASKS} | {kind.usual_metric for kind in TASKS.values()}
    tables = [read_json(path) for path in FOLDER.parent.glob("baselines/*/*/results.json")]
    assert len(tables) >= 18
    for table in tables:
        for config in table["configs"].values():
            for entry in config["metric_list"]:
                name, _, version = entry["metric"].rpartition("/")
                assert str(METRICS[name].version) == version
                used.add(name)
    assert len(used) == 6
    for name in used:
        assert load(name).compute is not None


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"number_match"}))
def test_modules_score_every_answer_as_the_evaluator_does(load: Callable[[str], Any], name: str) -> None:
    extra = {"distractors": DISTRACTORS} if name == "first_match_all" else {}
    result = load(name).compute(predictions=ANSWERS, references=EXPECTED, **extra)
    own = [METRICS[name].score(*row) for row in zip(ANSWERS, EXPECTED, DISTRACTORS, strict=True)]
    assert result["scores"] == own
    assert result["score"] == pytest.approx(sum(own) / len(own))
    assert 0 < result["score"] < 1
