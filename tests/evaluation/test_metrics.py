"""The `evaluate` metric gives what the evaluator itself scores."""

from __future__ import annotations

from pathlib import Path

import evaluate
import pytest

from ctxext.files import shipped_directory


def test_metric_loads_by_path_and_agrees_with_the_evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    metric = evaluate.load(str(shipped_directory("evals") / "metrics" / "number_match.py"), cache_dir=str(tmp_path))
    answers = [" 1234567.", "12345678", "it is 1234567, I think", ""]
    result = metric.compute(predictions=answers, references=["1234567"] * 4)
    assert result["accuracy"] == 0.5
    assert result["wilson_95"] == pytest.approx([0.150, 0.850], abs=1e-3)
