"""Whatever a recipe trains: the run ends in a merged checkpoint, and an interrupted one in the same, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import TARGET_LENGTH, Job, SilentReporter, json_lines, make_job
from transformers import AutoModelForCausalLM

from ctxext.errors import ArtefactError, InterruptedRunError, ResourceError, UsageError
from ctxext.export.merge import merge_adapter
from ctxext.files import read_json
from ctxext.pipeline.arms import open_arm, parse_arms
from ctxext.pipeline.extend import extend
from ctxext.pipeline.verify import find_checkpoint, verify_checkpoint
from ctxext.planning.plan import make_plan
from ctxext.train.metrics import StepMetrics

KINDS = {
    "full": ["adaptation=full"],
    "embeddings and norms": ["lora.rank=4", "lora.embeddings_and_norms=true"],
    "variants": [
        "lora.rank=4",
        "lora.weight_decomposed=true",
        "lora.rank_stabilized=true",
        "lora.dropout=0.1",
        "lora.targets=[q_proj, down_proj]",
    ],
}


def job_of(folder: Path) -> Job:
    """A job whose recipe leaves the block lora to the test."""
    job = make_job(folder)
    values = yaml.safe_load(job.recipe_path.read_text())
    del values["lora"]
    job.recipe_path.write_text(yaml.safe_dump(values, sort_keys=False))
    return job


def run(job: Job, kind: str, output: Path, *more: str, reporter: SilentReporter | None = None) -> Path:
    recipe = job.recipe(*KINDS[kind], f"output_dir={output}", *more)
    return extend(recipe, reporter or SilentReporter(), last_stage="merge")


class Interrupted(SilentReporter):
    """Presses Ctrl-C after a step."""

    def __init__(self, after: int) -> None:
        def press(metrics: StepMetrics) -> None:
            if metrics.step == after:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)

        super().__init__(on_step=press)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_merges_and_resumes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    job = job_of(tmp_path)
    whole_reporter = SilentReporter()
    whole = run(job, kind, tmp_path / "whole", reporter=whole_reporter)
    with pytest.raises(InterruptedRunError):
        run(job, kind, tmp_path / "halves", reporter=Interrupted(after=3))
    halves = run(job, kind, tmp_path / "halves")
    name = "trained" if kind == "full" else "adapter"
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    ours, theirs = (load_file(folder / name / file) for folder in (whole, halves))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    losses = [
        [line["loss"] for line in json_lines(folder / "metrics.jsonl") if "loss" in line] for folder in (whole, halves)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    plan, (start,) = make_plan(job.recipe(*KINDS[kind])), whole_reporter.starts
    assert [part.to_json() for part in start.trained] == plan.trained
    assert start.num_trainable == plan.num_trainable
    merged = AutoModelForCausalLM.from_pretrained(whole / "merged")
    assert merged.config.max_position_embeddings == TARGET_LENGTH
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "tiny").state_dict()
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, before[key])}
    assert len(changed) == {"full": 21, "embeddings and norms": 21, "variants": 4}[kind]
    check_size_of_checkpoints(whole, plan.num_trainable, plan.disk_bytes)


def check_size_of_checkpoints(folder: Path, num_trainable: int, disk_bytes: int) -> None:
    """Only what trains is in them, with both moments, all of it float32; and the plan knows how much that is."""
    newest = folder / "checkpoints" / "step-000004"
    stored, moments = (load_file(newest / f"{name}.safetensors") for name in ("adapter", "optimizer"))
    assert sum(tensor.numel() for tensor in stored.values()) == num_trainable
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert sum(t.numel() for name, t in moments.items() if "exp_avg" in name) == 2 * num_trainable
    used = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert disk_bytes / 2 < used < disk_bytes + 50_000  # headers and random states


def test_what_a_full_fine_tuning_wrote_is_verified_merged_and_opened_as_an_arm(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    folder = extend(job.recipe("adaptation=full"), SilentReporter(), last_stage="train")
    assert find_checkpoint(folder) == folder / "trained"
    provenance = read_json(folder / "trained" / "ctxext.json")
    assert (provenance["adaptation"], provenance["portable"]) == ("full", False)
    assert any("all checksums hold" in line for line in verify_checkpoint(folder))
    (spec,) = parse_arms([f"mine={folder}"], model=None, method="yarn", target_length=None)
    arm = open_arm(spec, model=None)
    assert (arm.reach, arm.original_length, arm.adapter) == (TARGET_LENGTH, 128, None)
    merge_adapter(folder / "trained", tmp_path / "merged", "float32")
    assert "portable" not in read_json(tmp_path / "merged" / "ctxext.json")
    assert any("made from" in line for line in verify_checkpoint(tmp_path / "merged"))
    for options in ({"scale": 0.5}, {"onto": str(tmp_path / "models" / "tiny")}):
        with pytest.raises(UsageError, match="every weight was trained"):
            merge_adapter(folder / "trained", tmp_path / "other", "float32", **options)  # type: ignore[arg-type]


def test_whole_embeddings_are_no_sum_that_could_be_scaled(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    folder = extend(job.recipe(*KINDS["embeddings and norms"]), SilentReporter(), last_stage="train")
    with pytest.raises(UsageError, match="--scale: the adapter holds embeddings and norms"):
        merge_adapter(folder / "adapter", tmp_path / "out", scale=0.5)


def test_the_control_arm_of_a_full_fine_tuning_is_trained_and_evaluated(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    recipe = job.recipe("adaptation=full", "evaluation.control=true", "evaluation.before=false", "train.steps=2")
    folder = extend(recipe, SilentReporter())
    control = folder / "control" / "trained"
    assert json.loads((control / "config.json").read_text())["rope_parameters"]["rope_type"] == "default"
    assert read_json(control / "ctxext.json")["method"]["method"] == "none"
    assert {"after", "control"} <= {path.name for path in (folder / "eval").iterdir()}


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    job = job_of(tmp_path)
    lora, full = (make_plan(job.recipe(*KINDS[kind])).disk_bytes for kind in ("variants", "full"))
    assert full > 3 * lora
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=(lora + full) // 2))
    with pytest.raises(ResourceError, match="checkpoints and the merged model"):
        run(job, "full", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def start(job: Job, adapter: Path, *more: str) -> Any:
    return job.recipe("lora.rank=4", f"lora.start_from={adapter}", *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    job = job_of(tmp_path_factory.mktemp("start"))
    recipe = job.recipe("lora.rank=4", f"output_dir={job.folder / 'first'}", "target_length=192", "train.steps=2")
    return job, extend(recipe, SilentReporter(), last_stage="train")


def test_training_goes_on_from_an_adapter_and_says_where_it_comes_from(
    trained: tuple[Job, Path], tmp_path: Path
) -> None:
    job, first = trained
    plan = make_plan(start(job, first))
    assert any("was trained with yarn to 192 positions; here: " in note for note in plan.notes)
    # At a rate of next to nothing what comes out is what went in.
    recipe = start(job, first, f"output_dir={tmp_path / 'second'}", "train.learning_rate=1e-12", "train.steps=1")
    second = extend(recipe, SilentReporter(), last_stage="train")
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second))
    assert any(bool(tensor.any()) for name, tensor in ours.items() if "lora_B" in name)
    assert all(torch.allclose(tensor, theirs[name], atol=1e-9) for name, tensor in ours.items())


def test_a_plan_depends_on_what_the_adapter_holds_and_not_on_its_path(
    trained: tuple[Job, Path], tmp_path: Path
) -> None:
    import shutil

    job, first = trained
    copied = Path(shutil.copytree(first / "adapter", tmp_path / "copied"))
    ids = [make_plan(start(job, path)).plan_id for path in (first, first / "adapter", copied)]
    assert len(set(ids)) == 1
    assert make_plan(job.recipe("lora.rank=4")).plan_id not in ids
    other = extend(job.recipe("lora.rank=4", f"output_dir={tmp_path / 'o'}"), SilentReporter(), last_stage="train")
    assert make_plan(start(job, other)).plan_id not in ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.rank=8"], "lora.rank is 8, the adapter's 4"),
        (["lora.alpha=3"], "lora.alpha is 3.0, the adapter's 32"),
        (["lora.rank_stabilized=true"], "lora.rank_stabilized is True, the adapter's False"),
        (["lora.weight_decomposed=true"], "lora.weight_decomposed is True"),
        (["lora.targets=[q_proj]"], r"other weights than the recipe's block lora asks for \(24 differ\)"),
        (["lora.embeddings_and_norms=true"], "other weights than the recipe's block lora asks for"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_in_the_plan(
    trained: tuple[Job, Path], settings: list[str], message: str
) -> None:
    job, first = trained
    with pytest.raises(UsageError, match=message):
        make_plan(job.recipe("lora.rank=4", f"lora.start_from={first}", *settings))


def test_an_adapter_for_other_weights_or_none_at_all_is_refused(trained: tuple[Job, Path], tmp_path: Path) -> None:
    _, first = trained
    (tmp_path / "other").mkdir()
    other = make_job(tmp_path / "other", model_seed=5)
    recipe = other.recipe("lora.rank=4", "lora.alpha=32", f"lora.start_from={first}")
    with pytest.raises(ArtefactError, match="trained on other weights"):
        make_plan(recipe)
    with pytest.raises(ArtefactError, match=r"lora\.start_from: no adapter here"):
        make_plan(other.recipe(f"lora.start_from={tmp_path}"))


def test_an_adapter_from_elsewhere_is_taken_and_said_to_know_nothing_of_positions(
    trained: tuple[Job, Path], tmp_path: Path
) -> None:
    import shutil

    job, first = trained
    foreign = Path(shutil.copytree(first / "adapter", tmp_path / "foreign"))
    for name in ("ctxext.json", "manifest.json", "config.json"):
        (foreign / name).unlink()
    notes = make_plan(start(job, foreign)).notes
    assert any("ctxext did not write: it says nothing of positions" in note for note in notes)
    (foreign / "adapter_model.safetensors").rename(foreign / "adapter_model.bin")
    with pytest.raises(ArtefactError, match="not stored as safetensors"):
        make_plan(start(job, foreign))
