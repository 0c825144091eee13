"""Stored samples: nothing finished is lost, nothing foreign is reused, everything else is derived."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support import file_size_limit, json_lines

from ctxext.errors import ArtefactError, ResourceError
from ctxext.evaluation.store import SampleResult, SampleStore, by_length, grid_of, load_samples, results_of

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


@pytest.mark.parametrize("num_bytes", [1, 40, 200])
def test_a_half_line_is_set_aside_and_the_rest_kept(tmp_path: Path, num_bytes: int) -> None:
    store = SampleStore(tmp_path, IDENTITY, {})
    store.add(result(0))
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    half = json.dumps(asdict(result(1))).encode()[:num_bytes]
    path.write_bytes(whole + half)
    again = SampleStore(tmp_path, IDENTITY, {})
    assert list(again.results.values()) == [result(0)]
    assert path.read_bytes() == whole
    assert (tmp_path / "samples.jsonl.half-line").read_bytes() == half
    again.add(result(1))
    assert load_samples(tmp_path) == [result(0), result(1)]


def test_damage_before_the_last_line_is_refused_with_its_line(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, IDENTITY, {})
    for index in range(3):
        store.add(result(index))
    path = tmp_path / "samples.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:50], lines[2]]) + "\n")
    with pytest.raises(ArtefactError, match=r"samples\.jsonl:2"):
        load_samples(tmp_path)
    path.write_text(lines[0] + '\n{"sample_id": "x"}\n')
    with pytest.raises(ArtefactError, match="not a sample"):
        load_samples(tmp_path)


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
    store = SampleStore(tmp_path, IDENTITY, {})
    for index in range(4):
        store.add(result(index, score=float(index > 0), metric="number_match/1", seconds=1.5))
    store.add(result(4, status="out_of_memory", score=0.0))
    store.add(result(0, length=200, degenerate="empty", score=0.0))
    store.write_results()
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == results_of(load_samples(tmp_path))
    assert written["results"]["100"]["accuracy"] == 0.75
    assert (written["results"]["100"]["num_right"], written["results"]["100"]["num_samples"]) == (3, 4)
    assert written["cells"][0]["num_missing"] == 1
    assert written["cells"][1]["num_degenerate"] == 1
    assert (written["num_samples"], written["num_haystacks"], written["seconds"]) == (5, 6, 6.0)


def test_a_cell_without_a_score_is_missing_not_zero() -> None:
    samples = [result(0, status="out_of_memory", score=0.0), result(0, length=200)]
    cells = grid_of(samples)
    assert [(cell.num_samples, cell.num_missing, cell.proportion is None) for cell in cells] == [
        (0, 1, True),
        (1, 0, False),
    ]
    assert list(by_length(samples)) == [200]
