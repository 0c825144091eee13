"""The data commands tell what training would read, and what is wrong with it, before anything is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import Job, SilentReporter, byte_tokenizer, make_job, write_suite

from ctxext.data.packing import PackedWindow, WindowBuilder
from ctxext.data.words import document
from ctxext.errors import ArtefactError, UsageError
from ctxext.evaluation.suite import load_suite
from ctxext.pipeline.data_commands import (
    data_build,
    data_sample,
    data_stats,
    print_json,
    print_samples,
    print_statistics,
)
from ctxext.pipeline.training_data import guard_for, prepare_training_data, report_notes, streamed_json
from ctxext.pipeline.window_view import view_window
from ctxext.recipe.load import shipped_names
from ctxext.recipe.schema import Recipe

HAYSTACK = [document(f"haystack/{number}", 30) for number in range(3)]
WIDTH = 80


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Twelve texts, one copied twice, one taken from the haystack of the suite."""
    monkeypatch.setenv("CTXEXT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number:02}.txt").write_text(document(f"own/{number}", 4 + 3 * number))
    (texts / "copy.txt").write_text(document("own/3", 13))
    (texts / "taken.txt").write_text(f"{document('front', 5)} {HAYSTACK[1]}")
    (tmp_path / "haystack").mkdir()
    for number, text in enumerate(HAYSTACK):
        (tmp_path / "haystack" / f"{number}.txt").write_text(text)
    job = make_job(tmp_path / "job")
    write_suite(job.folder / "suite.yaml", haystack={"text": [str(tmp_path / "haystack")]})
    return job


def recipe_of(job: Job, *overrides: str) -> Recipe:
    """Trained on the twelve texts, all of them read."""
    sources = json.dumps([{"kind": "text", "paths": [str(job.folder.parent / "texts/*.txt")]}])
    return job.recipe(f"data.sources={sources}", "train.steps=200", *overrides)


def shown(recipe: Recipe, folder: Path) -> tuple[str, Any]:
    statistics, where = data_stats(recipe, SilentReporter(), folder=folder)
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
    print_statistics(console, recipe, statistics, where)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), statistics


def test_statistics_tell_sources_mixture_ledger_duplicates_and_overlap(job: Job, tmp_path: Path) -> None:
    text, statistics = shown(recipe_of(job), tmp_path / "out")
    assert all(len(line) <= WIDTH for line in text.splitlines() if not line.startswith("Pictures"))
    (row,) = statistics.sources
    assert row.num_documents == 14
    assert row.num_tokens == sum(len(path.read_bytes()) + 1 for path in (tmp_path / "texts").glob("*"))
    assert row.fertility.level == "too high"
    assert statistics.duplicates.num_exact == 1
    assert statistics.contamination.documents
    flat = " ".join(text.split())
    assert "50% of the windows carry synthetic facts (passkey)" in flat
    assert "7.1% of 14 documents are exact copies" in flat
    assert "contamination: 1 of 14 training documents hold text of haystack text haystack" in flat
    assert "taken.txt: " in flat
    assert "tokens a word is too high" in flat
    assert str(tmp_path / "haystack") not in text


def test_every_token_is_accounted_for(job: Job, tmp_path: Path) -> None:
    _, statistics = shown(recipe_of(job, "train.steps=10"), tmp_path / "out")
    rows = {row.what: row.num_tokens for row in statistics.ledger}
    left_out = sum(count or 0 for what, count in rows.items() if "not read" in what)
    dropped = sum(count or 0 for what, count in rows.items() if "dropped" in what)
    assert rows["tokenised"] == rows["read in training"] + left_out
    assert rows["read in training"] == rows["in windows"] + dropped
    assert left_out > 0


def test_pictures_and_numbers_are_written(job: Job, tmp_path: Path) -> None:
    recipe = recipe_of(job)
    _, statistics = shown(recipe, tmp_path / "out")
    assert (tmp_path / "out/lengths.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/lengths.svg").read_text().startswith("<?xml")
    values = json.loads((tmp_path / "out/statistics.json").read_text())
    assert values == json.loads(print_json(statistics.to_json()))
    assert values["contamination"]["found"] is True
    assert values["facts"] == {"share": 0.5, "style": "passkey"}
    first = (tmp_path / "out/lengths.svg").read_bytes()
    shown(recipe, tmp_path / "again")
    assert (tmp_path / "again/lengths.svg").read_bytes() == first


def test_what_training_would_refuse_is_a_problem_here_and_no_error(job: Job, tmp_path: Path) -> None:
    settings = ["data.windows={mode: full-length}", "target_length=8192"]
    text, statistics = shown(recipe_of(job, *settings), tmp_path / "out")
    assert any("data.length.allow_short" in problem for problem in statistics.problems)
    assert any("shorter than one window" in problem or "half" in problem for problem in statistics.problems)
    assert "problem:" in text
    recipe = recipe_of(job, *settings)
    with pytest.raises(UsageError, match=r"data\.length\.allow_short"):
        prepare_training_data(recipe, byte_tokenizer(), SilentReporter(), original_length=128)


def test_contamination_is_refused_left_out_or_told_as_the_recipe_says(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"taken\.txt: 1 of 14"):
        data_build(recipe_of(job, "data.contamination=refuse"), SilentReporter())
    data = prepare_training_data(
        recipe_of(job, "data.contamination=exclude"), byte_tokenizer(), SilentReporter(), original_length=128
    )
    read = {data.cache.origin(int(number)) for number in data.selection.documents}
    assert len(read) == 13
    assert not any("taken" in origin for origin in read)
    assert report_notes(data.to_json()) == []
    told = prepare_training_data(recipe_of(job), byte_tokenizer(), SilentReporter(), original_length=128)
    kept = list((tmp_path / "cache").rglob("contamination/*.json"))
    assert len(kept) == 1  # found once, for all three
    (note,) = report_notes(json.loads(json.dumps(told.to_json())))
    assert note.startswith("Training text: contamination: 1 of 14")


def test_the_advice_on_the_target_length_speaks_of_the_users_own_text_only(job: Job) -> None:
    def notes(recipe: Recipe) -> str:
        data = prepare_training_data(recipe, byte_tokenizer(), SilentReporter(), original_length=128, allow_short=True)
        return " ".join(data.notes)

    assert "target_length=2048 would do" in notes(recipe_of(job, "target_length=8192"))
    assert "would do" not in notes(recipe_of(job, "target_length=2048"))
    assert "would do" not in notes(job.recipe("target_length=8192"))


def test_build_says_what_is_there_and_refuses_to_read_without_end(job: Job) -> None:
    lines = data_build(recipe_of(job), SilentReporter())
    assert "14 documents" in lines[0]
    with pytest.raises(UsageError, match=r"data\.sources\[0\].*no end"):
        data_build(job.recipe(), SilentReporter(), everything=True)
    assert "14 documents" in data_build(recipe_of(job, "train.steps=1"), SilentReporter(), everything=True)[0]
    assert "14 documents" not in data_build(recipe_of(job, "train.steps=1"), SilentReporter())[0]


def test_streamed_text_has_statistics_and_samples_and_no_cache_to_build(job: Job, tmp_path: Path) -> None:
    recipe = recipe_of(job, "data.cache=none")
    _, statistics = shown(recipe, tmp_path / "out")
    assert statistics.sources[0].num_documents == 14
    with pytest.raises(UsageError, match=r"data\.cache"):
        data_build(recipe, SilentReporter())
    assert "not checked" in streamed_json(recipe)["contamination"]["sentence"]
    assert report_notes(streamed_json(recipe)) == [
        "Training text: contamination not checked: the text was read while training, without a cache."
    ]
    with pytest.raises(UsageError, match=r"data\.contamination"):
        streamed_json(recipe_of(job, "data.cache=none", "data.contamination=exclude"))
    assert [view.num_tokens for view in data_sample(recipe, SilentReporter(), num_windows=3)] == [96] * 3


def test_samples_are_the_windows_that_training_begins_with(job: Job) -> None:
    recipe = recipe_of(job)
    views = data_sample(recipe, SilentReporter(), num_windows=4)
    data = prepare_training_data(recipe, byte_tokenizer(), SilentReporter(), original_length=128)
    builder = WindowBuilder(data.cache, recipe.data, byte_tokenizer(), recipe.target_length, data.selection)
    for view in views:
        window = builder.build(view.epoch, view.index)
        assert "".join(stretch.text for stretch in view.stretches) == byte_tokenizer().decode(window.input_ids)
        assert [s.begin for s in view.stretches if s.starts_document] == window.document_starts
        assert view.last_position == window.position_ids[-1]
    assert any(stretch.jump > 0 for view in views for stretch in view.stretches)
    with pytest.raises(UsageError, match="--windows"):
        data_sample(recipe, SilentReporter(), num_windows=0)


def test_a_window_shows_borders_positions_and_what_is_not_learned_without_colour() -> None:
    tokenizer = byte_tokenizer()
    text = "one document. another one"
    window = PackedWindow(
        input_ids=tokenizer(text).input_ids,
        position_ids=[*range(13), *range(100, 105), *range(7)],
        document_starts=[0, 13],
        num_facts=1,
        learned=[True] * 20 + [False] * 5,
    )
    view = view_window(window, tokenizer, 2, 7)
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    print_samples(console, [view])
    assert isinstance(console.file, io.StringIO)
    lines = [
        line.rstrip("- ") if line.startswith("--") else line.rstrip() for line in console.file.getvalue().splitlines()
    ]
    heading = "Window 7 of epoch 2: 25 tokens, 19 learned, 2 document starts, positions up to 104, 1 synthetic fact"
    assert " ".join(lines[:2]) == heading
    assert lines[2:10] == [
        "-- document: tokens 0-12 at 0-12",
        "one document.",
        "-- document, 87 skipped: tokens 13-17 at 100-104",
        " anot",
        "-- text goes on, positions begin anew: tokens 18-19 at 0-1",
        "he",
        "-- text goes on, not learned: tokens 20-24 at 2-6",
        "r one",
    ]
    long = PackedWindow(tokenizer("x" * 2000).input_ids, list(range(2000)), [0], 0)
    for full, count in ((True, 2000), (False, 480)):
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
        print_samples(console, [view_window(long, tokenizer, 0, 0)], full=full)
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue().count("x") == count


def test_the_guard_knows_haystacks_wordings_and_question_files_of_every_suite(tmp_path: Path) -> None:
    names = shipped_names("evals/suites")
    assert len(names) > 5
    for name in names:
        guard = guard_for(load_suite(name))
        suite = load_suite(name)
        cells = {reference.removeprefix("wording of ") for reference in guard.references if "wording" in reference}
        assert cells == {task.cell_name for task in suite.members if task.task_name != "cloze"}
    quick = guard_for(load_suite("quick"))
    found = quick.scan(["One of the special magic numbers for big-cat is: 7654321.", "a number is hidden"], "report")
    assert found.documents == (0,)
    assert guard_for(load_suite("tiny")).scan(["well, the pass key is 12345"], "report").documents == (0,)
    questions = tmp_path / "squad.json"
    paragraphs = [
        {
            "context": document(f"squad/{number}", 12),
            "qas": [{"question": f"q{number}?", "answers": [{"text": document(f"squad/{number}", 12).split()[3]}]}],
        }
        for number in range(9)
    ]
    questions.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    suite = write_suite(tmp_path / "suite.yaml", tasks=[{"task": "qa", "file": str(questions)}])
    values = [line for line in suite.read_text().splitlines() if not line.startswith(("wording", "max_new_tokens"))]
    suite.write_text("\n".join(values))
    guard = guard_for(load_suite(str(suite)))
    assert guard.references[0] == "question file squad.json"
    result = guard.scan([document(f"squad/{number}", 12) for number in range(12)], "report")
    assert result.documents == tuple(range(9))
