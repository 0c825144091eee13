"""Suites: lengths of the model resolved, every cell once, early results covering the whole grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support import write_suite

from ctxext.errors import RecipeError
from ctxext.evaluation.suite import GridRow, RelativeLength, Suite, load_suite, resolve_samples
from ctxext.recipe.load import shipped_names


def suite(*rows: GridRow, max_new_tokens: int = 16) -> Suite:
    return Suite(description="test", grid=list(rows), max_new_tokens=max_new_tokens)


def row(length: int | RelativeLength, depths: list[float], samples: int = 1) -> GridRow:
    return GridRow(length=length, depths=depths, samples=samples)


def test_every_cell_has_one_sample_before_any_has_two_and_short_ones_come_first() -> None:
    asked = suite(row(2048, [0.9, 0.1], 2), row(512, [0.5], 3))
    resolved = [(s.index, s.cell.length_tokens, s.cell.depth) for s in resolve_samples(asked, 1024, 4096)]
    assert resolved == [
        (0, 512, 0.5),
        (0, 2048, 0.1),
        (0, 2048, 0.9),
        (1, 512, 0.5),
        (1, 2048, 0.1),
        (1, 2048, 0.9),
        (2, 512, 0.5),
    ]


def test_relative_lengths_leave_room_for_the_answer() -> None:
    asked = suite(row(RelativeLength(target=0.75), [0.5]), row(RelativeLength(original=1.0), [0.5]), max_new_tokens=20)
    lengths = [sample.cell.length_tokens for sample in resolve_samples(asked, 1000, 4000)]
    assert lengths == [1000 - 20, 3000 - 20]


def test_a_relative_length_is_a_share_of_exactly_one_length() -> None:
    for values in ({}, {"target": 0.5, "original": 0.5}, {"target": 0.0}, {"target": 1.5}):
        with pytest.raises(ValidationError):
            RelativeLength(**values)


def test_a_cell_given_twice_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"length 984, depth 0.5 is given twice"):
        resolve_samples(suite(row(984, [0.5]), row(RelativeLength(original=1.0), [0.1, 0.5])), 1000, 4000)
    with pytest.raises(RecipeError, match="given twice"):
        resolve_samples(suite(row(512, [0.5, 0.5])), 1000, 4000)


def test_sample_names_do_not_depend_on_the_rest_of_the_grid() -> None:
    narrow = resolve_samples(suite(row(512, [0.5], 2)), 1024, 4096)
    wide = resolve_samples(suite(row(512, [0.0, 0.5, 1.0], 4), row(2048, [0.5], 1)), 1024, 4096)
    assert {sample.sample_id for sample in narrow} < {sample.sample_id for sample in wide}
    assert narrow[0].sample_id == "needle/512/0.5000/0"


def test_a_suite_file_reports_everything_that_is_wrong_with_lines(tmp_path: Path) -> None:
    path = write_suite(tmp_path / "bad.yaml", {"length": 8, "depths": [1.5], "samples": 0}, haystak="x", seed=-1)
    with pytest.raises(RecipeError) as caught:
        load_suite(str(path))
    assert len(caught.value.problems) >= 5
    assert all(f"{path}:" in problem for problem in caught.value.problems)
    assert any("did you mean 'haystack'" in problem for problem in caught.value.problems)


def tasks_suite(*tasks: dict[str, Any], **changes: Any) -> Suite:
    grid = [
        {"length": 600, "depths": [0.0, 1.0], "samples": 2},
        {"length": {"target": 0.5}, "depths": [0.5], "samples": 1},
    ]
    return Suite.model_validate({"description": "t", "tasks": list(tasks), "grid": grid, **changes})


def test_tasks_share_the_lengths_and_those_without_a_depth_have_one_cell_a_length() -> None:
    suite = tasks_suite({"task": "needle"}, {"task": "common_words", "name": "cwe"})
    cells: dict[tuple[str, int, float], int] = {}
    for sample in resolve_samples(suite, 1024, 4096):
        key = (sample.cell.task, sample.cell.length_tokens, sample.cell.depth)
        cells[key] = cells.get(key, 0) + 1
    half = 2048 - 120  # the longest answer of any task
    assert cells == {
        ("needle", 600, 0.0): 2,
        ("needle", 600, 1.0): 2,
        ("cwe", 600, 0.5): 4,
        ("needle", half, 0.5): 1,
        ("cwe", half, 0.5): 1,
    }


def test_a_tasks_own_grid_replaces_the_suites() -> None:
    own = [{"length": 900, "depths": [0.5], "samples": 3}]
    suite = tasks_suite({"task": "needle"}, {"task": "no_needle", "grid": own})
    lengths = {s.cell.length_tokens for s in resolve_samples(suite, 1024, 4096) if s.cell.task == "no_needle"}
    assert lengths == {900}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [{"task": "needle"}, {"task": "needle"}]}, "two tasks have the name needle"),
        ({"wording": "passkey"}, "belong to each task"),
        ({"max_new_tokens": 64}, "belong to each task"),
        ({"thinking": True}, "needs apply_chat_template"),
        ({"answer_prefix": False}, "needs apply_chat_template"),
        ({"tasks": [{"task": "needle", "num_queries": 2}]}, "more than num_keys"),
        ({"tasks": [{"task": "needle", "wording": "passkey", "num_keys": 2}]}, "passkey wording"),
        ({"tasks": [{"task": "no_needle", "num_keys": 2}]}, "single needle's options"),
        ({"tasks": [{"task": "qa", "file": "x.json", "hops": 2}]}, "hops belongs to generated"),
        ({"tasks": [{"task": "needle", "name": "A b"}]}, "pattern"),
    ],
)
def test_contradictions_are_refused_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tasks_suite({"task": "needle"}, **changes)


def test_mistakes_in_tasks_are_reported_with_lines_and_suggestions(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        """description: bad
tasks:
  - task: needle
    num_kyes: 4
  - task: comon_words
  - task: qa
    hops: 3
haystack: python-dokumentation
grid:
  - {length: 512, depths: [0.5], samples: 1}
"""
    )
    with pytest.raises(RecipeError) as caught:
        load_suite(str(path))
    text = "\n".join(caught.value.problems)
    for expected in (
        "bad.yaml:4: tasks.0.num_kyes: unknown key; did you mean 'num_keys'?",
        "bad.yaml:5: tasks.1.task: got 'comon_words'",
        "did you mean 'common_words'?",
        "bad.yaml:7: tasks.2.hops:",
        "bad.yaml:8: haystack:",
    ):
        assert expected in text, text


def test_a_suite_of_tasks_survives_writing_and_reading() -> None:
    for name in ("ruler", "needle-grid", "tail", "short-guard", "no-overlap"):
        suite = load_suite(name)
        assert suite.tasks is not None
        assert Suite.model_validate(suite.model_dump(mode="json")) == suite


def test_every_shipped_suite_resolves() -> None:
    names = shipped_names("evals/suites")
    assert len(names) >= 4
    for name in names:
        samples = resolve_samples(load_suite(name), 8192, 16384)
        assert len({sample.sample_id for sample in samples}) == len(samples) > 0
