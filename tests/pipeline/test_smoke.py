"""`extend --smoke`: every stage really runs, in a folder of its own, and a training that resumes wrongly is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import Job, SilentReporter, make_job

from ctxext.errors import ArtefactError, UsageError
from ctxext.files import read_json, verify_manifest
from ctxext.pipeline import smoke
from ctxext.pipeline.smoke import SmokeResult, run_smoke

ALL = ("evaluation.untrained=true", "evaluation.control=true", "train.steps=5000", "data.windows.length=96")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, SmokeResult, SilentReporter]:
    job, reporter = make_job(tmp_path_factory.mktemp("smoke")), SilentReporter()
    return job, run_smoke(job.recipe(*ALL), reporter), reporter


def test_every_stage_runs_and_training_is_resumed(done: tuple[Job, SmokeResult, SilentReporter]) -> None:
    _, result, reporter = done
    assert len(reporter.stages) == 6 + 1
    assert [start.resumed_step for start in reporter.starts] == [0, 0, 1]  # the arm, its control, the arm again
    assert (result.folder / "report" / "index.html").is_file()
    verify_manifest(result.folder / "merged")
    verify_manifest(result.folder / "adapter")
    assert read_json(result.folder / "status.json")["exit_code"] == 0
    for page in ("report/index.html", "merged/README.md"):
        assert "SMOKE TEST" in (result.folder / page).read_text()


def test_the_run_itself_is_not_begun(done: tuple[Job, SmokeResult, SilentReporter]) -> None:
    job, result, _ = done
    assert result.folder == job.output.with_name("run-smoke")
    assert not job.output.exists()


def test_it_says_what_it_shows_and_what_not(done: tuple[Job, SmokeResult, SilentReporter]) -> None:
    _, result, _ = done
    shown, not_shown = " ".join(result.shown), " ".join(result.not_shown)
    assert "128 -> 256" in shown
    assert "(base, untrained, extended, control)" in shown
    assert "fits into memory" in not_shown
    assert "windows of the full length" not in not_shown


def test_another_smoke_test_begins_anew_but_takes_no_other_folder(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    folder = tmp_path / "run-smoke"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="holds something else"):
        run_smoke(job.recipe(), SilentReporter())
    assert (folder / "thesis.txt").read_text() == "precious"
    (folder / "thesis.txt").rename(folder / smoke.MARK)
    result = run_smoke(job.recipe("data.windows={mode: full-length}"), SilentReporter())
    assert "windows of the full length" in " ".join(result.not_shown)


def test_a_training_that_resumes_to_other_weights_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ctxext.train import loop

    # What a forgotten piece of state does: the random numbers of the resumed step are not those of the first time.
    monkeypatch.setattr(loop, "set_random_state", lambda accelerator, states: None)
    job = make_job(tmp_path)
    with pytest.raises(ArtefactError, match="ended in other weights"):
        run_smoke(job.recipe("lora.dropout=0.2", "evaluation.before=false"), SilentReporter())
