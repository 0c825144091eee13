"""A plan says in words what training reads, and where its facts come close to the suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import Job, make_job

from ctxext.evaluation.suite import load_suite
from ctxext.planning.data_plan import data_lines, facts_notes
from ctxext.planning.plan import make_plan
from ctxext.recipe.data import DataBlock


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


def block(**values: object) -> DataBlock:
    return DataBlock.model_validate({"sources": [{"kind": "python-stdlib"}], **values})


def test_sources_lengths_facts_and_contamination_are_told_with_their_shares() -> None:
    data = block(
        sources=[{"kind": "text", "paths": ["a/*.txt"], "weight": 3.0}, {"kind": "generated-words"}],
        length={"long_share": 0.6},
        facts={"share": 0.25, "style": "mixed", "per_window": 2},
        contamination="exclude",
    )
    assert data_lines(data, 1000) == [
        "text a/*.txt 75%, generated-words 25%",
        "60% of every source's tokens come from documents of 500 tokens or more",
        "25% of the windows carry synthetic facts with questions (mixed, 2 a window): they train retrieval, which is "
        "not extension",
        "contamination: documents that hold what the suite asks about are left out",
    ]
    upsampled = data_lines(block(length={"upsample": 5.0, "long_from": 300}), 1000)
    assert upsampled[1] == "documents of 300 tokens or more are taken 5 times as often"
    assert len(data_lines(block(facts={"share": 0.0}), 1000)) == 2


@pytest.mark.parametrize(
    ("style", "suite", "said"),
    [
        ("records", "tiny", "a twelfth"),
        ("records", "quickstart", None),
        ("mixed", "tiny", None),
        ("tables", "tiny", None),
        ("references", "ruler", None),
        ("passkey", "tiny", "own wording"),
        ("passkey", "quickstart", "other suites"),
    ],
)
def test_facts_that_look_like_what_the_suite_asks_are_noted(style: str, suite: str, said: str | None) -> None:
    notes = list(facts_notes(block(facts={"share": 0.5, "style": style}), load_suite(suite)))
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]
    assert not list(facts_notes(block(), load_suite(suite)))


def test_the_plan_carries_both(job: Job) -> None:
    plan = make_plan(job.recipe())
    assert plan.data[0] == "generated-words"
    assert "50% of the windows carry synthetic facts with questions (passkey" in plan.data[1]
    assert any("own wording" in note for note in plan.notes)


def test_what_only_moves_or_allows_data_changes_no_plan(job: Job, tmp_path: Path) -> None:
    plan_id = make_plan(job.recipe()).plan_id
    assert make_plan(job.recipe(f"data.cache={tmp_path}")).plan_id == plan_id
    assert make_plan(job.recipe("data.length.allow_short=true")).plan_id == plan_id
    assert make_plan(job.recipe("data.cache=none")).plan_id != plan_id
    assert make_plan(job.recipe("data.length.upsample=5.0")).plan_id != plan_id


def test_what_is_left_out_for_the_suite_depends_on_the_suite(job: Job) -> None:
    exclude, other = "data.contamination=exclude", "evaluation.suite=quick"
    assert make_plan(job.recipe(exclude)).plan_id != make_plan(job.recipe(exclude, other)).plan_id
    assert make_plan(job.recipe()).plan_id == make_plan(job.recipe(other)).plan_id
