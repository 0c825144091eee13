"""`results.json` in the harness's keys, and the cells as CSV: derived from samples alone."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from known_answers import arm, grid, hole, oracle, tail_blind

from ctxext.evaluation.statistics import wilson
from ctxext.evaluation.tables import cells_table, results_table

RUN = {
    "identity": {"weights": {"source": "tiny", "fingerprint": "f"}, "seed": 3, "dtype": "float32", "max_new_tokens": 8},
    "environment": {"device": "cpu", "packages": {"transformers": "5.0"}},
}
# What lm-evaluation-harness's evaluator writes at the top level (lm_eval/evaluator.py, simple_evaluate).
HARNESS_KEYS = {"results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"}


def test_the_harness_keys_are_there_with_one_entry_a_task() -> None:
    table = results_table([*grid(oracle), *grid(hole, task="qa")], run=RUN, suite={"name": "quick"})
    assert table.keys() >= HARNESS_KEYS
    for key in HARNESS_KEYS - {"config"}:
        assert list(table[key]) == ["needle", "qa"]
    assert table["results"]["needle"]["score,none"] == 1.0
    assert table["results"]["qa"]["4096,none"] == 0.8
    assert table["results"]["qa"]["alias"] == "qa"
    assert table["versions"] == {"needle": "1", "qa": "1"}
    assert table["n-samples"]["qa"] == {"original": 75, "effective": 75}
    assert table["config"]["model_args"] == RUN["identity"]["weights"]
    assert (table["transformers_version"], table["environment"]["device"]) == ("5.0", "cpu")
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_a_length_carries_its_interval_and_standard_error() -> None:
    numbers = results_table(grid(hole), run=RUN)["results"]["needle"]
    assert numbers["1024_interval_95,none"] == pytest.approx([wilson(20, 25).low, wilson(20, 25).high], abs=1e-6)
    assert numbers["1024_stderr,none"] == pytest.approx((0.8 * 0.2 / 25) ** 0.5, abs=1e-6)
    assert numbers["1024_haystacks,none"] == 25


def test_shared_haystacks_widen_the_interval() -> None:
    numbers = results_table(grid(oracle, shared=True), run=RUN)["results"]["needle"]
    assert numbers["1024_haystacks,none"] == 5
    assert numbers["1024_interval_95,none"][0] == pytest.approx(wilson(5, 5).low, abs=1e-6)


def test_effective_length_and_tail_stand_beside_the_results() -> None:
    table = results_table(grid(tail_blind, shared=True), run=RUN)
    assert [entry["by"] for entry in table["effective_length"]["needle"]] == ["estimate", "bound"] * 2
    assert table["tail"]["needle"]["value"] == -1.0
    refused = results_table(grid(oracle, depths=[0.5]), run=RUN)["tail"]["needle"]
    assert refused["value"] is None
    assert "tenth" in refused["reason"]


def test_missing_samples_are_counted_and_not_scored_as_wrong() -> None:
    samples = grid(oracle, [1024], depths=[0.5], per_cell=3)
    samples[0] = replace(samples[0], status="out_of_memory", score=0.0)
    table = results_table(samples, run={})
    assert table["results"]["needle"]["score,none"] == 1.0
    assert table["n-samples"]["needle"] == {"original": 3, "effective": 2}
    assert (table["cells"][0]["num_samples"], table["cells"][0]["num_missing"]) == (2, 1)
    none = results_table([replace(sample, status="out_of_memory") for sample in samples], run={})
    assert none["results"]["needle"] == {"alias": "needle"}
    assert "score" not in none["cells"][0]


def test_partial_scores_are_averaged_and_whole_ones_counted() -> None:
    samples = [replace(sample, score=0.5) for sample in grid(oracle, [1024], depths=[0.5], per_cell=4)]
    table = results_table([*samples[:3], replace(samples[3], score=1.0)], run={})
    assert table["results"]["needle"]["score,none"] == 0.625
    assert table["results"]["needle"]["accuracy,none"] == 0.25
    assert table["cells"][0]["num_right"] == 1


def test_the_csv_has_one_line_a_cell_and_arm() -> None:
    text = cells_table([arm("base", grid(hole)), arm("extended", grid(oracle), recorded=True)])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 30
    middle = next(row for row in rows if (row["arm"], row["depth"], row["length_tokens"]) == ("base", "0.5", "2048"))
    assert (middle["num_right"], middle["num_samples"], middle["score"]) == ("0", "5", "0.0")
    assert (middle["recorded"], rows[-1]["recorded"]) == ("false", "true")
    assert float(rows[-1]["low"]) == pytest.approx(wilson(5, 5).low, abs=1e-6)


def test_every_task_has_its_own_answer_budget() -> None:
    tasks = {"needle": {"max_new_tokens": 24, "metric": ["a/1"]}, "qa": {"max_new_tokens": 128}}
    run = {"identity": {"weights": {}, "tasks": tasks}}
    table = results_table([*grid(oracle), *grid(oracle, task="qa")], run=run, suite={"max_new_tokens": 16})
    budgets = {task: table["configs"][task]["generation_kwargs"]["max_gen_toks"] for task in ("needle", "qa")}
    assert budgets == {"needle": 24, "qa": 128}
    assert table["config"]["gen_kwargs"]["max_gen_toks"] == 128
    assert table["configs"]["qa"]["metadata"] == {"max_new_tokens": 128}
    assert table["suite"] == {"max_new_tokens": 16}
    single = results_table(grid(oracle), run=RUN)
    assert single["configs"]["needle"]["generation_kwargs"]["max_gen_toks"] == 8
    assert single["config"]["gen_kwargs"]["max_gen_toks"] == 8
