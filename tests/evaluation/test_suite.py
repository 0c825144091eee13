"""Suites: lengths of the model resolved, every cell once, early results covering the whole grid."""

from __future__ import annotations

from pathlib import Path

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


def test_every_shipped_suite_resolves() -> None:
    names = shipped_names("evals/suites")
    assert len(names) >= 4
    for name in names:
        samples = resolve_samples(load_suite(name), 8192, 16384)
        assert len({sample.sample_id for sample in samples}) == len(samples) > 0
