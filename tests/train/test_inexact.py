"""Going on with other settings: refused with a table, allowed on request, and then told by everything that is made."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import Job, SilentReporter, make_job

from ctxext.errors import InterruptedRunError, ResumeError, exit_code_of
from ctxext.files import read_json, write_json_atomic, write_manifest
from ctxext.pipeline.extend import extend
from ctxext.train.inexact import sentences, trained_inexactly
from ctxext.train.random_state import nothing_drawn

SLOWER = ("train.learning_rate=0.005",)
DROPOUT = ("lora.dropout=0.1",)


def stopped(folder: Path, *overrides: str) -> Job:
    """A run that was interrupted after two of four steps."""
    job = make_job(folder)

    def stop(metrics: Any) -> None:
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        extend(job.recipe(*overrides), SilentReporter(on_step=stop), last_stage="train")
    return job


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return stopped(tmp_path_factory.mktemp("interrupted"))


def copy(job: Job, folder: Path) -> str:
    """A copy of a run to go on in, as a setting."""
    return f"output_dir={shutil.copytree(job.output, folder / 'run')}"


def change_state(run: Path, **changes: Any) -> None:
    """Make the newest checkpoint one of another run, with good checksums."""
    folder = max((run / "checkpoints").iterdir())
    state = read_json(folder / "state.json")
    write_json_atomic(folder / "state.json", state | changes)
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def test_a_changed_recipe_is_refused_with_what_differs_and_what_it_does(interrupted: Job, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in interrupted.output.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError) as caught:
        extend(interrupted.recipe(*SLOWER, "train.windows_per_device=2"), SilentReporter())
    assert exit_code_of(caught.value) == 2
    first, heading, *rows, hint = str(caught.value).splitlines()
    assert first.endswith("the folder holds a run of another plan")
    assert heading.split() == ["setting", "stored", "now", "effect"]
    assert [row.split(maxsplit=3) for row in rows] == [
        ["train.learning_rate", "0.01", "0.005", "changes results"],
        ["train.windows_per_device", "1", "2", "changes the last bits only"],
    ]
    assert "--allow-inexact-resume" in hint
    after = {path: path.read_bytes() for path in interrupted.output.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} <= {interrupted.output / "status.json"}


def test_other_positions_are_refused_even_when_inexactness_is_allowed(interrupted: Job) -> None:
    with pytest.raises(ResumeError, match="another model; cannot be resumed") as caught:
        extend(interrupted.recipe("rope.method=linear"), SilentReporter(), allow_inexact=True)
    assert "--allow-inexact-resume" not in str(caught.value)


def test_what_changes_nothing_is_free_to_change(interrupted: Job, tmp_path: Path) -> None:
    free = (
        "train.checkpoint_every=1",
        "train.trackers=[tensorboard]",
        "train.max_hours=9.0",
        "evaluation.before=false",
    )
    reporter = SilentReporter()
    extend(interrupted.recipe(*free, copy(interrupted, tmp_path)), reporter, last_stage="train")
    assert [start.resumed_step for start in reporter.starts] == [2]
    assert not (tmp_path / "run" / "inexact.json").exists()


def test_before_anything_is_trained_settings_are_free_but_the_model_is_not(interrupted: Job, tmp_path: Path) -> None:
    setting = copy(interrupted, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ResumeError):
        extend(interrupted.recipe("rope.method=linear", setting), SilentReporter(), last_stage="train")
    extend(interrupted.recipe(*SLOWER, setting), SilentReporter(), last_stage="train")
    assert not (tmp_path / "run" / "inexact.json").exists()


def test_an_inexact_resume_is_told_by_everything_that_is_made_afterwards(interrupted: Job, tmp_path: Path) -> None:
    setting, reporter = copy(interrupted, tmp_path), SilentReporter()
    extend(interrupted.recipe(*SLOWER, setting), reporter, allow_inexact=True)
    run = tmp_path / "run"
    assert any("inexact from step 2 on: train.learning_rate 0.01 -> 0.005" in m for m in reporter.starts[0].messages)
    (entry,) = read_json(run / "inexact.json")
    assert (entry["arm"], entry["step"]) == ("extended", 2)
    assert entry["differences"] == [{"key": "train.learning_rate", "stored": 0.01, "new": 0.005, "effect": "results"}]
    for folder in ("adapter", "merged"):
        assert read_json(run / folder / "ctxext.json")["inexact_resumes"] == [entry]
    assert read_json(run / "status.json")["inexact_resumes"] == [entry]
    (sentence,) = sentences([entry])
    assert "after step 2 with other settings (train.learning_rate 0.01 -> 0.005)" in sentence
    for page in ("report/index.html", "merged/README.md"):
        text = re.sub(r"\\", "", (run / page).read_text()).replace("-&gt;", "->").replace("&#45;", "-")
        assert "train.learning_rate 0.01 -> 0.005" in text, page
    with pytest.raises(ResumeError, match="which has finished its training"):
        extend(interrupted.recipe(setting), SilentReporter(), allow_inexact=True)


def test_a_run_that_was_never_inexact_says_nothing_of_it(interrupted: Job, tmp_path: Path) -> None:
    extend(interrupted.recipe(copy(interrupted, tmp_path)), SilentReporter())
    for name in ("status.json", "adapter/ctxext.json", "merged/ctxext.json", "merged/README.md", "report/index.html"):
        assert "other settings" not in (tmp_path / "run" / name).read_text()
        assert "inexact" not in (tmp_path / "run" / name).read_text()


def test_earlier_stages_of_a_curriculum_are_told_of_too() -> None:
    entry = {"arm": "extended", "step": 1, "differences": [{"key": "k", "stored": 1, "new": 2, "effect": "results"}]}
    assert len(trained_inexactly({"stages": [{"inexact_resumes": [entry]}, {}], "inexact_resumes": [entry]})) == 2
    assert trained_inexactly({}) == []


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"data_sha256": "another"}, r"training-tokens +another"),
        ({"decides": {}}, r"train.seed +- +0 +changes results"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    change: dict[str, Any], row: str, interrupted: Job, tmp_path: Path
) -> None:
    setting = copy(interrupted, tmp_path)
    change_state(tmp_path / "run", **change)
    with pytest.raises(ResumeError, match="checkpoint belongs to another run") as caught:
        extend(interrupted.recipe(setting), SilentReporter(), last_stage="train")
    assert re.search(row, str(caught.value))


def test_the_precision_that_is_in_use_decides_too(interrupted: Job, tmp_path: Path) -> None:
    setting = copy(interrupted, tmp_path)
    stored = read_json(max((tmp_path / "run" / "checkpoints").iterdir()) / "state.json")["decides"]
    assert (stored["dtype-in-use"], stored["device"]) == ("float32", "cpu")
    change_state(tmp_path / "run", decides=stored | {"dtype-in-use": "bfloat16", "device": "cuda"})
    with pytest.raises(ResumeError, match=r"(?s)dtype-in-use +bfloat16 +float32 +changes results.*last bits only"):
        extend(interrupted.recipe(setting), SilentReporter(), last_stage="train")


def test_another_number_of_processes_is_refused_where_random_numbers_are_drawn(tmp_path: Path) -> None:
    job = stopped(tmp_path, *DROPOUT)
    change_state(job.output, num_processes=2)
    with pytest.raises(ResumeError, match=r"processes +2 +1 +changes results"):
        extend(job.recipe(*DROPOUT), SilentReporter(), last_stage="train")
    reporter = SilentReporter()
    extend(job.recipe(*DROPOUT), reporter, last_stage="train", allow_inexact=True)
    assert [start.resumed_step for start in reporter.starts] == [2]
    assert (
        read_json(job.output / "adapter" / "ctxext.json")["inexact_resumes"][0]["differences"][0]["key"] == "processes"
    )


def test_drawn_random_numbers_show_in_the_stored_states(interrupted: Job, tmp_path: Path) -> None:
    def states(job: Job) -> dict[str, torch.Tensor]:
        return load_file(max((job.output / "checkpoints").iterdir()) / "random.safetensors")

    assert nothing_drawn(states(interrupted), seed=0)
    assert not nothing_drawn(states(interrupted), seed=1)
    assert not nothing_drawn(states(stopped(tmp_path, *DROPOUT)), seed=0)
    untouched, drawn = torch.zeros(1, 16, dtype=torch.uint8), torch.zeros(1, 16, dtype=torch.uint8)
    untouched[0, 0], drawn[0, 8] = 7, 4  # CUDA: the seed's bytes, then those of the offset
    assert nothing_drawn(states(interrupted) | {"cuda": untouched}, seed=0)
    assert not nothing_drawn(states(interrupted) | {"cuda": drawn}, seed=0)


def test_another_machine_or_software_is_said_on_resuming(interrupted: Job, tmp_path: Path) -> None:
    setting = copy(interrupted, tmp_path)
    path = tmp_path / "run" / "environment.json"
    facts = read_json(path)
    write_json_atomic(path, facts | {"packages": facts["packages"] | {"torch": "1.0"}})
    reporter = SilentReporter()
    extend(interrupted.recipe(setting), reporter, last_stage="train")
    (said,) = [message for message in reporter.messages if "machine or software" in message]
    assert f"torch 1.0 -> {facts['packages']['torch']}; last bits may differ" in said
