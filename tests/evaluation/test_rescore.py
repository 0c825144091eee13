"""Stored answers scored anew without the model: what flips is told, the old samples stay, the identity follows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import file_size_limit, json_lines

from ctxext.errors import ArtefactError, ResourceError, UsageError
from ctxext.evaluation.prompt import draft_of, prompt_identity
from ctxext.evaluation.rescore import rescore_folder, rescored, with_metrics
from ctxext.evaluation.results import derived_results
from ctxext.evaluation.store import SampleResult, SampleStore, load_samples
from ctxext.evaluation.suite import Sample, Suite, load_suite, resolve_samples
from ctxext.files import fingerprint

ROW = {"length": 400, "depths": [0.0, 1.0], "samples": 2}
TASKS = Suite.model_validate(
    {
        "description": "t",
        "haystack": "generated-words",
        "tasks": [{"task": "needle", "name": "four", "num_keys": 4}, {"task": "variable_tracking"}],
        "grid": [ROW],
    }
)


def answered(sample: Sample, answer: str, metric: str, suite: Suite) -> SampleResult:
    """A stored sample with an answer, scored as the evaluator does."""
    draft = draft_of(suite, sample)
    cell = sample.cell
    plain = SampleResult(
        sample_id=sample.sample_id,
        task=cell.task,
        length_tokens=cell.length_tokens,
        depth=cell.depth,
        index=sample.index,
        status="ok",
        needle_position=3,
        haystack_sha256="h",
        prompt_sha256=f"prompt of {sample.sample_id}",
        key=draft.key,
        expected=" | ".join(draft.answers),
        answer=answer,
        answers=list(draft.answers),
        metric=metric,
        scores={metric: 0.0},
    )
    return rescored(plain, suite, thinking=False)


def folder_of(folder: Path, suite: Suite, metric: str, answer: str) -> list[SampleResult]:
    """A folder of samples with one answer made from each sample's expected one."""
    identity = {"weights": {"source": "tiny"}, **prompt_identity(suite)}
    store = SampleStore(folder, identity, {"suite": suite.model_dump(mode="json")})
    for sample in resolve_samples(suite, 400, 400):
        expected = draft_of(suite, sample).answers[0]
        store.add(answered(sample, answer.format(expected=expected), metric, suite))
    return load_samples(folder)


def run_of(folder: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return run


def test_another_metric_flips_what_it_should_and_keeps_the_old_samples(tmp_path: Path) -> None:
    suite = load_suite("tiny")
    before = folder_of(tmp_path, suite, "number_match/1", " {expected}7")
    assert {sample.score for sample in before} == {0.0}
    old = (tmp_path / "samples.jsonl").read_bytes()
    done = rescore_folder(tmp_path, suite, "string_match_all")
    after = load_samples(tmp_path)
    assert {(s.score, s.metric) for s in after} == {(1.0, "string_match_all/1")}
    assert all(
        s.scores == {"string_match_all/1": 1.0, "whole_match_all/1": 0.0, "first_match_all/1": 0.0} for s in after
    )
    assert (len(done.flipped), done.num_answers) == (500, 500)
    assert "500 answers are right that were wrong, 0 are wrong that were right" in done.summary()
    assert done.kept == tmp_path / "samples.before-rescore-1.jsonl"
    assert done.kept.read_bytes() == old
    assert [(s.sample_id, s.answer) for s in after] == [(s.sample_id, s.answer) for s in before]
    assert json.loads((tmp_path / "results.json").read_text()) == derived_results(tmp_path)
    run = run_of(tmp_path)
    assert run["identity"]["metric"] == "string_match_all/1"
    assert run["identity_hash"] == fingerprint(run["identity"])
    back = rescore_folder(tmp_path, suite, "number_match")
    assert back.kept == tmp_path / "samples.before-rescore-2.jsonl"
    assert {s.score for s in load_samples(tmp_path)} == {0.0}
    SampleStore(tmp_path, {"weights": {"source": "tiny"}, **prompt_identity(suite)}, {})


def test_the_same_metric_in_the_same_version_writes_nothing(tmp_path: Path) -> None:
    folder_of(tmp_path, load_suite("tiny"), "number_match/1", " {expected}")
    old = (tmp_path / "samples.jsonl").read_bytes()
    done = rescore_folder(tmp_path, load_suite("tiny"))
    assert (done.changed, done.kept) == ([], None)
    assert (tmp_path / "samples.jsonl").read_bytes() == old
    assert not list(tmp_path.glob("*before*"))


def test_an_outdated_version_is_refused_until_it_was_scored_anew(tmp_path: Path) -> None:
    folder_of(tmp_path, TASKS, "string_match_all/1", " {expected}")
    present = {"weights": {"source": "tiny"}, **prompt_identity(TASKS)}
    for name in ("samples.jsonl", "run.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("string_match_all/1", "string_match_all/0"))
    run = run_of(tmp_path)
    run["identity_hash"] = fingerprint(run["identity"])
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ArtefactError, match=r"string_match_all/0.*ctxext eval --rescore"):
        SampleStore(tmp_path, present, {})
    done = rescore_folder(tmp_path, TASKS)
    assert len(done.changed) == 8
    assert not done.flipped
    store = SampleStore(tmp_path, present, {})
    first = next(iter(store.results.values()))
    assert store.finished(first.sample_id, first.prompt_sha256) == first


def test_distractors_are_drawn_again_for_the_metric_that_knows_them(tmp_path: Path) -> None:
    sample = resolve_samples(TASKS, 400, 400)[0]
    draft = draft_of(TASKS, sample)
    assert draft.distractors
    everything = f" {', '.join((*draft.distractors, *draft.answers))}"
    stored = answered(sample, everything, "string_match_all/1", TASKS)
    assert (stored.score, stored.scores["first_match_all/1"]) == (1.0, 0.0)
    with pytest.raises(UsageError, match="whole run"):
        rescored(stored, None, thinking=False)
    with pytest.raises(ArtefactError, match="draws another sample"):
        rescored(replace(stored, answers=["1"]), TASKS, thinking=False)
    with pytest.raises(ArtefactError, match="no such task"):
        rescored(replace(stored, task="other"), TASKS, thinking=False)


def test_thoughts_are_not_scored_where_the_model_was_to_think() -> None:
    suite = load_suite("tiny")
    sample = resolve_samples(suite, 128, 512)[0]
    stored = answered(sample, "", "number_match/1", suite)
    musing = replace(stored, answer=f"<think> {stored.expected}? </think> I do not know")
    assert rescored(musing, suite, thinking=False).score == 1.0
    assert rescored(musing, suite, thinking=True).score == 0.0


def test_a_sample_without_an_answer_and_an_unknown_metric() -> None:
    suite = load_suite("tiny")
    stored = answered(resolve_samples(suite, 128, 512)[0], "", "number_match/1", suite)
    lost = replace(stored, status="out_of_memory", metric="")
    assert rescored(lost, suite, thinking=False) is lost
    with pytest.raises(UsageError, match=r"unknown metric.*Did you mean 'number_match'"):
        rescored(stored, suite, "number_mach", thinking=False)


def test_a_full_disk_keeps_the_old_samples(tmp_path: Path) -> None:
    suite = load_suite("tiny")
    folder_of(tmp_path, suite, "number_match/1", " {expected}7")
    old = (tmp_path / "samples.jsonl").read_bytes()
    with file_size_limit(len(old) + 10), pytest.raises(ResourceError):
        rescore_folder(tmp_path, suite, "string_match_all")
    assert (tmp_path / "samples.jsonl").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "samples.jsonl"]
    assert len(rescore_folder(tmp_path, suite, "string_match_all").flipped) == 500


def test_samples_of_several_processes_are_gathered_first(tmp_path: Path) -> None:
    folder_of(tmp_path, load_suite("tiny"), "number_match/1", "")
    (tmp_path / "samples.rank1.jsonl").write_text(json.dumps(json_lines(tmp_path / "samples.jsonl")[0]) + "\n")
    with pytest.raises(ArtefactError, match="again first"):
        rescore_folder(tmp_path, None, "number_match")


def test_a_suite_with_that_metric_would_have_the_identity_of_the_rescored_samples() -> None:
    tasks = [{**task.model_dump(mode="json", exclude_none=True), "metric": "whole_match_all"} for task in TASKS.members]
    asked = Suite.model_validate({**TASKS.model_dump(mode="json"), "tasks": tasks})
    changed = with_metrics(prompt_identity(TASKS), "whole_match_all")
    assert changed == prompt_identity(asked)
    assert changed != prompt_identity(TASKS)
