"""The whole job on a tiny model: a run folder that describes itself, and a second run that has nothing left to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import Job, SilentReporter, byte_tokenizer, json_lines, make_job, step_lines, write_suite

from ctxext.errors import ArtefactError, CtxextError, RecipeError, ResumeError, UsageError
from ctxext.evaluation.results import derived_results
from ctxext.evaluation.store import load_samples
from ctxext.files import verify_manifest
from ctxext.model.loss import token_losses
from ctxext.pipeline.evaluate import evaluate_models
from ctxext.pipeline.evaluation_plan import EvaluationRequest
from ctxext.pipeline.extend import extend
from ctxext.pipeline.recipes import recipe_of
from ctxext.pipeline.report import arms_of_run, gather, record_baseline, recorded_arms, report_run
from ctxext.pipeline.run_folder import RunFolder
from ctxext.pipeline.summary import print_report
from ctxext.pipeline.verify import verify_checkpoint
from ctxext.planning.plan import make_plan
from ctxext.rope.verify import verify_positions

ALL_ARMS = ("evaluation.control=true", "evaluation.untrained=true", "train.trackers=[tensorboard]")


def finished_run(folder: Path) -> tuple[Job, SilentReporter]:
    job, reporter = make_job(folder), SilentReporter()
    extend(job.recipe(*ALL_ARMS), reporter)
    return job, reporter


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, SilentReporter]:
    """One run with every arm; tests only read it, or run it again."""
    return finished_run(tmp_path_factory.mktemp("extend"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_folder_describes_itself(finished: tuple[Job, SilentReporter]) -> None:
    job, _ = finished
    names = set(contents(job.output))
    expected = {"recipe.yaml", "plan.json", "environment.json", "status.json", "metrics.jsonl"}
    expected |= {f"checkpoints/step-{step:06d}/manifest.json" for step in (2, 4)}
    expected |= {f"adapter/{name}" for name in ("config.json", "ctxext.json", "adapter_model.safetensors")}
    expected |= {f"merged/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "manifest.json")}
    expected |= {
        f"eval/{arm}/{name}"
        for arm in ("before", "untrained", "after", "control")
        for name in ("run.json", "samples.jsonl", "results.json")
    }
    expected |= {f"report/heatmap-{arm}.{kind}" for arm in ("base", "extended", "control") for kind in ("png", "svg")}
    expected |= {"report/index.html", "report/cells.csv", "control/metrics.jsonl", "control/adapter/config.json"}
    assert expected <= names
    assert not [name for name in names if ".partial-" in name]
    assert [name for name in names if name.startswith("tensorboard/")]


def test_the_small_files_say_what_was_done(finished: tuple[Job, SilentReporter]) -> None:
    job, _ = finished
    status = json.loads((job.output / "status.json").read_text())
    assert (status["exit_code"], status["reason"]) == (0, "done")
    assert set(status["stages"]) == {"evaluate-base", "evaluate-untrained", "train", "merge", "control", "report"}
    plan = json.loads((job.output / "plan.json").read_text())
    assert (plan["original_length"], plan["target_length"], plan["factor"]) == (128, 256, 2.0)
    assert plan["arms"] == ["base", "untrained", "extended", "control"]
    assert recipe_of(str(job.output / "recipe.yaml"), []) == job.recipe(*ALL_ARMS)
    environment = json.loads((job.output / "environment.json").read_text())
    assert {"torch", "transformers", "peft"} <= set(environment["packages"])
    assert [line["step"] for line in step_lines(job.output)] == [1, 2, 3, 4]
    for folder in ("checkpoints/step-000002", "checkpoints/step-000004", "adapter", "merged", "control/adapter"):
        verify_manifest(job.output / folder)


def test_all_arms_answer_the_same_prompts_and_results_follow_from_samples(
    finished: tuple[Job, SilentReporter],
) -> None:
    run = RunFolder(finished[0].output)
    arms = arms_of_run(run, "yarn")
    assert [arm.name for arm in arms] == ["base", "untrained", "control", "extended"]
    prompts = [{(sample.sample_id, sample.prompt_sha256) for sample in arm.samples} for arm in arms]
    assert len(prompts[0]) == 4
    assert all(other == prompts[0] for other in prompts)
    for arm in arms:
        stored = json.loads((run.evaluation(arm.name) / "results.json").read_text())
        assert stored == derived_results(run.evaluation(arm.name))
    losses = {arm.name: tuple(tuple(sample.loss_blocks) for sample in arm.samples) for arm in arms}
    assert len(set(losses.values())) == 4


def test_the_control_arm_has_the_same_training_without_the_rewrite(finished: tuple[Job, SilentReporter]) -> None:
    job, reporter = finished
    kept = json.loads((job.output / "control" / "adapter" / "config.json").read_text())
    extended = json.loads((job.output / "adapter" / "config.json").read_text())
    assert kept["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert kept["max_position_embeddings"] == extended["max_position_embeddings"] == 256
    assert extended["rope_parameters"]["rope_type"] == "yarn"
    mine, theirs = (step_lines(job.output / part) for part in ("", "control"))
    assert [line["num_tokens"] for line in mine] == [line["num_tokens"] for line in theirs]
    assert [line["loss"] for line in mine] != [line["loss"] for line in theirs]
    assert [start.verification.attention_factor for start in reporter.starts] == [pytest.approx(1.0693, abs=1e-4), 1.0]


def test_a_second_run_changes_no_result(finished: tuple[Job, SilentReporter]) -> None:
    job, _ = finished
    before = contents(job.output)
    reporter = SilentReporter()
    extend(job.recipe(*ALL_ARMS), reporter)
    after = contents(job.output)
    assert reporter.samples == []
    assert reporter.starts == []
    assert before.keys() == after.keys()
    # Only the times of the stages may differ.
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"status.json", "report/index.html", "report/summary.json"}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps=5", "train.steps  4 "),
        ("target_length=384", "target_length    256"),
        ("data.seed=1", "data.seed  0 "),
        ("lora.rank=2", "lora.rank  4 "),
    ],
)
def test_another_recipe_on_the_same_folder_is_refused_naming_what_differs(
    finished: tuple[Job, SilentReporter], override: str, named: str
) -> None:
    job, _ = finished
    before = contents(job.output)
    with pytest.raises(ResumeError, match="run of another plan") as caught:
        extend(job.recipe(*ALL_ARMS, override), SilentReporter())
    assert named in str(caught.value)
    assert {k: v for k, v in contents(job.output).items() if k != "status.json"} == {
        k: v for k, v in before.items() if k != "status.json"
    }


def test_the_plan_id_is_of_what_changes_results_and_of_nothing_else(
    finished: tuple[Job, SilentReporter], tmp_path: Path
) -> None:
    job, _ = finished
    reference = make_plan(job.recipe()).plan_id
    suite = write_suite(tmp_path / "other.yaml", {"length": 200, "depths": [0.5], "samples": 1})
    for override in (
        f"output_dir={tmp_path}",
        f"evaluation.suite={suite}",
        "evaluation.before=false",
        "evaluation.control=true",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=7",
        "train.trackers=[tensorboard]",
    ):
        assert make_plan(job.recipe(override)).plan_id == reference, override
    for override in (
        "train.steps=5",
        "train.learning_rate=0.02",
        "train.seed=1",
        "data.seed=1",
        "data.windows.length=64",
        "data.facts.share=0.6",
        "lora.rank=2",
        "rope.method=linear",
        "target_length=512",
    ):
        assert make_plan(job.recipe(override)).plan_id != reference, override


def test_a_wider_suite_reuses_what_it_shares_and_adds_the_rest(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    extend(job.recipe(), SilentReporter())
    first = (job.output / "eval" / "after" / "samples.jsonl").read_text()
    rows = ({"length": length, "depths": [0.0, 0.5, 1.0], "samples": 1} for length in (100, 240))
    write_suite(job.folder / "suite.yaml", *rows)
    extend(job.recipe(), SilentReporter())
    second = (job.output / "eval" / "after" / "samples.jsonl").read_text()
    assert second.startswith(first)
    assert (len(first.splitlines()), len(second.splitlines())) == (4, 6)


@pytest.mark.parametrize("change", [{"seed": 7}, {"wording": "ruler"}, {"max_new_tokens": 3}], ids=str)
def test_samples_of_another_suite_are_never_reported_as_this_ones(tmp_path: Path, change: dict[str, Any]) -> None:
    rows = [{"length": 480, "depths": [0.5], "samples": 1}]
    job = make_job(tmp_path, rows=rows)
    extend(job.recipe("target_length=512"), SilentReporter())
    write_suite(job.folder / "suite.yaml", *rows, **change)
    with pytest.raises(ArtefactError, match="an evaluation of something else") as caught:
        extend(job.recipe("target_length=512"), SilentReporter())
    assert next(iter(change)) in str(caught.value.got)


def test_rope_none_is_a_control_arm_of_its_own(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    values = yaml.safe_load(job.recipe_path.read_text()) | {"rope": {"method": "none", "control": True}}
    job.recipe_path.write_text(yaml.safe_dump(values))
    extend(job.recipe("evaluation.before=false"), SilentReporter())
    assert [arm.name for arm in arms_of_run(RunFolder(job.output), "none")] == ["control"]
    assert not (job.output / "eval" / "after").exists()
    config = json.loads((job.output / "merged" / "config.json").read_text())
    assert (config["rope_scaling"], config["max_position_embeddings"]) == (None, 256)


def test_rope_none_must_be_asked_for_as_a_control_arm(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="control"):
        make_job(tmp_path).recipe("rope.method=none")


def test_training_alone_stops_at_the_adapter_and_extend_goes_on_from_there(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    extend(job.recipe(), SilentReporter(), last_stage="train")
    assert (job.output / "adapter").is_dir()
    assert not (job.output / "merged").exists()
    assert not (job.output / "eval").exists()
    before = contents(job.output / "adapter")
    reporter = SilentReporter()
    extend(job.recipe(), reporter)
    assert reporter.starts == []
    assert contents(job.output / "adapter") == before
    assert (job.output / "report" / "index.html").is_file()


def test_full_length_windows_with_records_facts_train_and_report_their_share(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A quiet line about nothing in particular.\n" * 300)
    job = make_job(tmp_path)
    values = yaml.safe_load(job.recipe_path.read_text())
    values["data"] = {"sources": [{"kind": "text", "paths": [str(text)]}], "facts": {"share": 1.0}}
    values["train"] |= {"steps": 2, "windows_per_device": 2}
    job.recipe_path.write_text(yaml.safe_dump(values))
    extend(job.recipe(), SilentReporter())
    facts, _ = gather(RunFolder(job.output), job.recipe())
    assert (facts.facts_share, facts.facts_style) == (1.0, "records")
    assert "full-length windows of 256 tokens" in facts.windows
    assert step_lines(job.output)[0]["num_tokens"] == 2 * 255


def test_a_recorded_baseline_reads_back_as_recorded_arms(
    finished: tuple[Job, SilentReporter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(finished[0].output)
    folder = record_baseline(run, tmp_path / "baselines" / "tiny", command="ctxext extend tiny", hardware="two cores")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"baseline.json", "recipe.yaml", "base/samples.jsonl", "extended/results.json", "heatmaps.png"} <= names
    assert "index.html" not in names
    monkeypatch.setattr("ctxext.pipeline.baselines.shipped_directory", lambda name: tmp_path)
    arms, facts = recorded_arms("tiny")
    live = arms_of_run(run, "yarn")
    assert [arm.name for arm in arms] == [arm.name for arm in live]
    assert all(arm.recorded for arm in arms)
    for stored, original in zip(arms, live, strict=True):
        assert stored.samples == original.samples
    assert (facts["command"], facts["hardware"]) == ("ctxext extend tiny", "two cores")
    with pytest.raises(UsageError, match=r"unknown recorded baseline.*Did you mean 'tiny'"):
        recorded_arms("tny")
    with pytest.raises(ArtefactError, match="exists already"):
        record_baseline(run, folder, command="c", hardware="h")


def test_a_report_is_drawn_again_from_the_samples_alone(finished: tuple[Job, SilentReporter]) -> None:
    run = RunFolder(finished[0].output)
    report_run(run)
    before = contents(run.report)
    for path in run.report.iterdir():
        path.unlink()
    report_run(run)
    assert contents(run.report) == before


def test_a_run_without_evaluations_has_nothing_to_report(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    extend(job.recipe(), SilentReporter(), last_stage="train")
    with pytest.raises(ArtefactError, match="nothing has been evaluated"):
        report_run(RunFolder(job.output))
    with pytest.raises(ArtefactError, match="not a run folder"):
        report_run(RunFolder(tmp_path / "models"))


def test_verify_tells_of_checksums_origin_and_positions(finished: tuple[Job, SilentReporter]) -> None:
    job, _ = finished
    for part in ("", "merged", "adapter"):
        lines = list(verify_checkpoint(job.output / part))
        assert any("all checksums hold" in line for line in lines)
        assert any("yarn, 128 to 256 positions" in line for line in lines)
        assert any("positions in effect: 1 rotary module x 8 frequencies" in line for line in lines)
        assert any("positions back influence the last one" in line for line in lines)


def test_verify_refuses_a_folder_whose_positions_are_not_those_it_was_made_with(tmp_path: Path) -> None:
    job, _ = make_job(tmp_path), None
    extend(job.recipe(), SilentReporter())
    config = json.loads((job.output / "merged" / "config.json").read_text())
    for key in ("rope_parameters", "rope_scaling"):
        config[key]["factor"] = 4.0
    (job.output / "merged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match=r"config\.json: the file"):
        list(verify_checkpoint(job.output))
    (job.output / "merged" / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match=r"has other positions than .* with yarn"):
        list(verify_checkpoint(job.output))


def test_evaluating_a_merged_checkpoint_gives_the_answers_of_the_run(
    finished: tuple[Job, SilentReporter], tmp_path: Path
) -> None:
    job, _ = finished
    folder, merged = tmp_path / "evaluation", str(job.output / "merged")
    asked = EvaluationRequest(
        merged, suite=str(job.folder / "suite.yaml"), output=str(folder), dtype="float32", beyond_reach=True
    )
    assert evaluate_models(asked, SilentReporter()) == folder
    assert (folder / "report" / "index.html").is_file()
    again = {sample.sample_id: (sample.answer_ids, sample.loss_blocks) for sample in load_samples(folder)}
    run = {s.sample_id: (s.answer_ids, s.loss_blocks) for s in load_samples(job.output / "eval" / "after")}
    assert again == run
    reporter = SilentReporter()
    evaluate_models(asked, reporter)
    assert len(reporter.samples) == 4
    assert len(json_lines(folder / "samples.jsonl")) == 4
    with pytest.raises(ArtefactError, match=r"something else.*weights"):
        evaluate_models(replace(asked, model=str(job.folder / "models" / "tiny")), SilentReporter())


def test_a_single_evaluation_is_reported_again_and_never_recorded(
    finished: tuple[Job, SilentReporter], tmp_path: Path
) -> None:
    from rich.console import Console

    from ctxext.pipeline.console import ConsoleReporter

    job, _ = finished
    folder = tmp_path / "evaluation"
    model, suite = str(job.folder / "models" / "tiny"), str(job.folder / "suite.yaml")
    asked = EvaluationRequest(model, suite=suite, output=str(folder), dtype="float32", beyond_reach=True)
    evaluate_models(asked, SilentReporter())
    before = contents(folder / "report")
    for path in (folder / "report").iterdir():
        path.unlink()
    reporter = ConsoleReporter(Console(quiet=True))
    print_report(reporter, folder, None, command="", hardware="")
    assert contents(folder / "report") == before
    with pytest.raises(UsageError, match="only a run can be recorded"):
        print_report(reporter, folder, tmp_path / "baseline", command="c", hardware="h")


def test_status_names_a_bug_too(tmp_path: Path) -> None:
    def fail(metrics: Any) -> None:
        raise ZeroDivisionError("a bug")

    job = make_job(tmp_path)
    with pytest.raises(ZeroDivisionError):
        extend(job.recipe(), SilentReporter(on_step=fail), last_stage="train")
    status = json.loads((job.output / "status.json").read_text())
    assert (status["exit_code"], status["reason"]) == (1, "ZeroDivisionError: a bug")


def test_out_of_memory_in_training_is_a_resource_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def exhausted(hidden: Any, *arguments: Any, **settings: Any) -> Any:
        if len(hidden) == 96:  # a window; what is tried before the first step is not one
            raise torch.OutOfMemoryError("tried to allocate too much")
        return token_losses(hidden, *arguments, **settings)

    monkeypatch.setattr("ctxext.model.loss.token_losses", exhausted)
    job = make_job(tmp_path)
    with pytest.raises(CtxextError, match=r"out of memory in training step 1.*activation_checkpointing"):
        extend(job.recipe("train.probe=false"), SilentReporter(), last_stage="train")
    assert json.loads((job.output / "status.json").read_text())["exit_code"] == 4


def test_the_tokenizer_of_the_merged_model_knows_the_new_length(finished: tuple[Job, SilentReporter]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = finished[0].output / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.model_max_length == 256
    assert tokenizer("any text").input_ids == byte_tokenizer()("any text").input_ids
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert verify_positions(model, model.config).target_length == 256
