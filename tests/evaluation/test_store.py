"""Stored samples: nothing finished is lost, nothing foreign is reused, everything else is derived."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support import file_size_limit, json_lines

from ctxext.errors import ArtefactError, ResourceError
from ctxext.evaluation.results import derived_results, write_results
from ctxext.evaluation.store import SampleResult, SampleStore, by_length, grid_of, load_samples
from ctxext.files import shipped_directory
from ctxext.pipeline.stored_runs import stored_arms

BASELINES = sorted({path.parent.parent for path in shipped_directory("evals").glob("baselines/*/*/samples.jsonl")})
IDENTITY: dict[str, Any] = {"weights": {"source": "tiny"}, "seed": 0}


def result(index: int = 0, *, length: int = 100, depth: float = 0.5, **facts: Any) -> SampleResult:
    name = f"needle/{length}/{depth:.4f}/{index}"
    values: dict[str, Any] = {"status": "ok", "prompt_sha256": f"prompt of {name}", "score": 1.0, **facts}
    return SampleResult(
        name,
        "needle",
        length,
        depth,
        index,
        needle_position=3,
        haystack_sha256=f"haystack of {name}",
        key="k",
        expected="12345",
        **values,
    )


def test_a_stored_sample_comes_back_equal(tmp_path: Path) -> None:
    stored = result(answer="é \n", answer_ids=[1, 2], loss_blocks=[1.5, 2.25], metric="number_match/1", seconds=0.5)
    SampleStore(tmp_path, IDENTITY, {}).add(stored)
    assert load_samples(tmp_path) == [stored]


def test_only_the_same_prompt_with_a_score_is_reused(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, IDENTITY, {})
    store.add(result(0))
    store.add(result(1, status="out_of_memory"))
    again = SampleStore(tmp_path, IDENTITY, {})
    assert again.finished(result(0).sample_id, result(0).prompt_sha256) == result(0)
    assert again.finished(result(0).sample_id, "another prompt") is None
    assert again.finished(result(1).sample_id, result(1).prompt_sha256) is None
    assert again.finished("needle/100/0.5000/7", "x") is None


def test_the_last_line_of_a_sample_counts(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, IDENTITY, {})
    store.add(result(0, status="out_of_memory", score=0.0))
    store.add(result(0))
    assert load_samples(tmp_path) == [result(0)]
    assert len(json_lines(tmp_path / "samples.jsonl")) == 2


def rejected(folder: Path) -> list[tuple[int, str]]:
    return [(row["line"], row["text"]) for row in json_lines(folder / "samples.rejected.jsonl")]


@pytest.mark.parametrize("num_bytes", [1, 40, 200])
def test_a_half_line_is_set_aside_by_who_goes_on_writing(
    tmp_path: Path, num_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = SampleStore(tmp_path, IDENTITY, {})
    store.add(result(0))
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    half = json.dumps(asdict(result(1))).encode()[:num_bytes]
    path.write_bytes(whole + half)
    again = SampleStore(tmp_path, IDENTITY, {})
    assert list(again.results.values()) == [result(0)]
    assert path.read_bytes() == whole
    assert rejected(tmp_path) == [(2, half.decode())]
    assert "line 2 was cut short or damaged and is set aside in samples.rejected.jsonl" in caplog.text
    again.add(result(1))
    assert load_samples(tmp_path) == [result(0), result(1)]


def test_torn_lines_between_finished_ones_lose_nothing_finished(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, IDENTITY, {})
    for index in range(4):
        store.add(result(index))
    path = tmp_path / "samples.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[1][:50], lines[2], b"\0" * 80, b"\xff\xfe", lines[3][:-1]]))
    again = SampleStore(tmp_path, IDENTITY, {})
    assert set(again.results) == {result(0).sample_id, result(2).sample_id}
    assert path.read_bytes() == lines[0] + b"\n" + lines[2] + b"\n"
    assert [line for line, _ in rejected(tmp_path)] == [2, 4, 5, 6]
    SampleStore(tmp_path, IDENTITY, {})
    assert len(rejected(tmp_path)) == 4, "what is set aside is so once"


def test_who_only_reads_skips_a_half_line_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SampleStore(tmp_path, IDENTITY, {}).add(result(0))
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes() + b'{"sample_id":"ha')
    before = path.read_bytes()
    assert load_samples(tmp_path) == [result(0)]
    assert "samples.jsonl:2: not readable" in caplog.text
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.json", "samples.jsonl"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"sample_id": "x"}', "task: Field required"),
        ("7", "not a sample"),
        ("[]", "not a sample"),
        (json.dumps({**asdict(result(1)), "score": "1"}), "score: Input should be a valid number"),
        (json.dumps({**asdict(result(1)), "colour": "red"}), "colour: Unexpected keyword argument"),
        (json.dumps({**asdict(result(1)), "score": float("nan")}), "score: Input should be a finite number"),
    ],
)
def test_json_that_is_no_sample_is_refused_with_its_line(tmp_path: Path, line: str, named: str) -> None:
    SampleStore(tmp_path, IDENTITY, {}).add(result(0))
    with (tmp_path / "samples.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ArtefactError, match=rf"samples\.jsonl:2: .*{named}"):
        load_samples(tmp_path)
    with pytest.raises(ArtefactError, match=r"samples\.jsonl:2"):
        SampleStore(tmp_path, IDENTITY, {})


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_store import IDENTITY, result
from ctxext.evaluation.store import SampleStore
store = SampleStore(Path(sys.argv[1]), IDENTITY, {})
first = len(store.results)
for index in range(first, first + 100_000):
    store.add(result(index, answer="x" * 3000, answer_ids=list(range(800))))
    print(index, flush=True)
"""


def test_a_kill_in_the_middle_of_real_writes_loses_nothing_finished(tmp_path: Path) -> None:
    finished = 0
    for kill_after in (3, 17, 40):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert writer.stdout is not None
        for _ in range(kill_after):
            last = int(writer.stdout.readline())
        writer.kill()
        told = [int(line) for line in writer.stdout.read().split("\n") if line]
        writer.wait()
        stored = {sample.index for sample in load_samples(tmp_path)}
        finished = max([last, *told]) + 1
        assert stored >= set(range(finished)), "what was said to be stored is there"
    assert finished >= 60


def test_a_score_by_another_version_of_its_metric_is_not_reused_silently(tmp_path: Path) -> None:
    identity = {**IDENTITY, "metric": "number_match/0"}
    SampleStore(tmp_path, identity, {}).add(result(0, metric="number_match/1"))
    with pytest.raises(ArtefactError, match=r"scored by another metric.*number_match/0.*--rescore"):
        SampleStore(tmp_path, {**IDENTITY, "metric": "number_match/1"}, {})
    nested = {"tasks": {"vt": {"metric": ["string_match_all/1"], "max_new_tokens": 3}}}
    SampleStore(tmp_path / "tasks", nested, {})
    with pytest.raises(ArtefactError, match=r"string_match_all/1.*--rescore"):
        SampleStore(tmp_path / "tasks", {"tasks": {"vt": {"metric": ["whole_match_all/1"], "max_new_tokens": 3}}}, {})
    with pytest.raises(ArtefactError, match="something else"):
        SampleStore(tmp_path / "tasks", {"tasks": {"vt": {"metric": ["string_match_all/1"], "max_new_tokens": 4}}}, {})


@pytest.mark.parametrize(
    "facts", [{"metric": "number_match/0"}, {"metric": "x/1"}, {"scores": {"number_match/9": 1.0}}]
)
def test_stored_scores_that_no_present_metric_made_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    SampleStore(tmp_path, IDENTITY, {}).add(result(0, **facts))
    with pytest.raises(ArtefactError, match="--rescore"):
        SampleStore(tmp_path, IDENTITY, {})


def test_the_grid_that_was_asked_last_is_the_one_that_is_stored(tmp_path: Path) -> None:
    SampleStore(tmp_path, IDENTITY, {"suite": {"grid": 1}, "arm": "base"})
    SampleStore(tmp_path, IDENTITY, {"suite": {"grid": 2}, "arm": "other"})
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["suite"], run["arm"]) == ({"grid": 2}, "base")


def test_another_identity_is_refused_naming_what_differs(tmp_path: Path) -> None:
    SampleStore(tmp_path, IDENTITY, {}).add(result(0))
    with pytest.raises(ArtefactError, match=r"something else.*'seed'"):
        SampleStore(tmp_path, {**IDENTITY, "seed": 1}, {})
    with pytest.raises(ArtefactError, match="dtype, seed"):
        SampleStore(tmp_path, {"weights": IDENTITY["weights"], "dtype": "bfloat16"}, {})


def test_facts_beside_the_identity_do_not_decide_reuse(tmp_path: Path) -> None:
    SampleStore(tmp_path, IDENTITY, {"environment": {"python": "3.11"}}).add(result(0))
    again = SampleStore(tmp_path, IDENTITY, {"environment": {"python": "3.12"}})
    assert len(again.results) == 1


def test_a_full_disk_keeps_every_finished_sample(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, IDENTITY, {})
    store.add(result(0))
    size = (tmp_path / "samples.jsonl").stat().st_size
    with file_size_limit(size + 100), pytest.raises(ResourceError, match="could not append"):
        store.add(result(1))
    again = SampleStore(tmp_path, IDENTITY, {})
    assert list(again.results.values()) == [result(0)]
    again.add(result(1))
    assert load_samples(tmp_path) == [result(0), result(1)]


def test_results_are_derived_from_the_samples_alone(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, {**IDENTITY, "max_new_tokens": 16}, {"suite": {"name": "quick"}})
    for index in range(4):
        store.add(result(index, score=float(index > 0), metric="number_match/1", seconds=1.5))
    store.add(result(4, status="out_of_memory", score=0.0))
    store.add(result(0, length=200, degenerate="empty", score=0.0, metric="number_match/1"))
    written = write_results(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == written == derived_results(tmp_path)
    assert written["results"]["needle"]["100,none"] == 0.75
    assert written["n-samples"] == {"needle": {"original": 6, "effective": 5}}
    assert (written["cells"][0]["num_missing"], written["cells"][1]["num_degenerate"]) == (1, 1)
    assert (written["total_evaluation_time_seconds"], written["suite"]) == (6.0, {"name": "quick"})
    store.add(result(1, score=0.0, metric="number_match/1"))
    assert write_results(tmp_path)["results"]["needle"]["100,none"] == 0.5


def test_recorded_results_are_what_their_samples_give() -> None:
    folders = [arm.folder for name in BASELINES for arm in stored_arms(str(name))]
    assert len(folders) >= 18
    for name in BASELINES:
        for arm in stored_arms(str(name)):
            suite = arm.suite.model_dump(mode="json") if arm.suite else None
            stored = json.loads((arm.folder / "results.json").read_text())
            assert stored == derived_results(arm.folder, suite=suite), arm.folder


def test_a_cell_without_a_score_is_missing_not_zero() -> None:
    samples = [result(0, status="out_of_memory", score=0.0), result(0, length=200)]
    cells = grid_of(samples)
    assert [(cell.num_samples, cell.num_missing, cell.proportion is None) for cell in cells] == [
        (0, 1, True),
        (1, 0, False),
    ]
    assert list(by_length(samples)) == [200]
