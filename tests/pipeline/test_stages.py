"""A curriculum: each stage trains on from what the stage before has merged, and positions are never scaled twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support import Job, SilentReporter, make_job, step_lines

from ctxext.errors import RecipeError, ResumeError
from ctxext.files import read_json
from ctxext.model.load import load_config, load_model, resolve_source
from ctxext.pipeline.stages import run_recipe, stages_of
from ctxext.pipeline.verify import verify_checkpoint

STAGES: list[dict[str, Any]] = [
    {"target_length": 192, "train": {"steps": 2}},
    {"target_length": 256, "rope": {"method": "linear"}, "data": {"seed": 7}},
]

LONG_WINDOWS = {"windows": {"mode": "skip-wise", "length": 200}}


def staged_job(folder: Path, stages: list[dict[str, Any]] | None = None, **changes: Any) -> Job:
    job = make_job(folder)
    values = yaml.safe_load(job.recipe_path.read_text())
    values |= {"stages": stages or STAGES, **changes}
    job.recipe_path.write_text(yaml.safe_dump(values, sort_keys=False))
    return job


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, SilentReporter]:
    job, reporter = staged_job(tmp_path_factory.mktemp("staged")), SilentReporter()
    run_recipe(job.recipe(), reporter)
    return job, reporter


def test_every_stage_trains_and_the_last_one_is_the_run(finished: tuple[Job, SilentReporter]) -> None:
    job, _ = finished
    first, last = job.output / "stages" / "1", job.output
    assert len(step_lines(first)) == 2
    assert len(step_lines(last)) == 4
    assert read_json(last / "status.json")["exit_code"] == 0
    assert (last / "report" / "index.html").is_file()
    assert not (first / "eval").exists()


def test_positions_are_rewritten_from_the_original_ones(finished: tuple[Job, SilentReporter]) -> None:
    job, _ = finished
    plans = [read_json(folder / "plan.json") for folder in (job.output / "stages" / "1", job.output)]
    assert [(plan["original_length"], plan["target_length"], plan["factor"]) for plan in plans] == [
        (128, 192, 1.5),
        (128, 256, 2.0),
    ]
    config = load_config(resolve_source(str(job.output / "merged")))
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["factor"] == 2.0
    assert config.max_position_embeddings == 256


def test_the_last_stage_starts_from_the_weights_of_the_first(finished: tuple[Job, SilentReporter]) -> None:
    import torch

    job, _ = finished

    def weight(folder: Path) -> torch.Tensor:
        source = resolve_source(str(folder))
        model = load_model(source, load_config(source), dtype=torch.float32, device=torch.device("cpu"))
        found: torch.Tensor = model.get_submodule("model.layers.0.self_attn.q_proj").weight
        return found

    original = weight(job.folder / "models" / "tiny")
    first, last = weight(job.output / "stages" / "1" / "merged"), weight(job.output / "merged")
    assert not torch.equal(original, first)
    assert not torch.equal(first, last)
    assert read_json(job.output / "adapter" / "ctxext.json")["base"]["source"].endswith("stages/1/merged")


def test_the_base_arm_is_the_model_before_all_stages(finished: tuple[Job, SilentReporter]) -> None:
    job, _ = finished
    weights = read_json(job.output / "eval" / "before" / "run.json")["identity"]["weights"]
    assert weights["source"] == str(job.folder / "models" / "tiny")
    provenance = read_json(job.output / "merged" / "ctxext.json")
    assert provenance["base"]["source"] == str(job.folder / "models" / "tiny")
    assert [(stage["method"], stage["target_length"]) for stage in provenance["stages"]] == [("yarn", 192)]
    assert any("positions in effect" in line for line in verify_checkpoint(job.output))


def test_a_finished_curriculum_has_nothing_left_to_do(finished: tuple[Job, SilentReporter]) -> None:
    job, _ = finished
    before = (job.output / "metrics.jsonl").read_bytes()
    reporter = SilentReporter()
    run_recipe(job.recipe(), reporter)
    assert (job.output / "metrics.jsonl").read_bytes() == before
    assert reporter.starts == []


def test_a_folder_of_another_curriculum_is_refused(finished: tuple[Job, SilentReporter]) -> None:
    job, _ = finished
    with pytest.raises(ResumeError, match=r"stages/1.*run of another plan"):
        run_recipe(job.recipe("data.seed=99"), SilentReporter())


def test_training_alone_ends_with_the_last_adapter(tmp_path: Path) -> None:
    job = staged_job(tmp_path)
    run_recipe(job.recipe(), SilentReporter(), last_stage="train")
    assert (job.output / "stages" / "1" / "merged").is_dir()
    assert (job.output / "adapter").is_dir()
    assert not (job.output / "merged").exists()


@pytest.mark.parametrize(
    ("stages", "changes", "says"),
    [
        ([{"target_length": 256}, {"target_length": 192}], {}, "must not fall"),
        ([{"target_length": 192}, {"target_length": 224}], {}, r"last stage's target_length \(224\).*\(256\)"),
        ([{"target_length": 256}], {}, "at least 2"),
        (STAGES, {"evaluation": {"control": True}}, "for the control arm run it once more"),
        (
            [{"target_length": 192, "data": {"windows": {"mode": "skip-wise", "length": 200}}}, STAGES[1]],
            {},
            "exceeds target_length",
        ),
        ([{"target_length": 192, "steps": 3}, STAGES[1]], {}, "steps"),
    ],
)
def test_stages_that_do_not_fit_are_refused(
    tmp_path: Path, stages: list[dict[str, Any]], changes: dict[str, Any], says: str
) -> None:
    job = staged_job(tmp_path, stages, **changes)
    with pytest.raises(RecipeError, match=says):
        job.recipe()


def test_a_stage_whose_checkpoint_cannot_be_trained_further_is_refused(tmp_path: Path) -> None:
    job = staged_job(tmp_path, [{"target_length": 192, "rope": {"method": "resonance"}}, STAGES[1]])
    with pytest.raises(RecipeError, match=r"stages\.0\.rope: resonance"):
        stages_of(job.recipe())
