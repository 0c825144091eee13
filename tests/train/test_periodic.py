"""Evaluation during training changes no bit, chooses by its rule, survives interruptions, and keeps what it chose."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import Job, SilentReporter, json_lines, make_job, step_lines, tiny_model, write_suite

from ctxext.errors import UsageError
from ctxext.evaluation.suite import load_suite
from ctxext.files import read_json
from ctxext.pipeline.extend import extend, make_plan
from ctxext.planning.periodic_plan import deciding_samples, evaluated_steps
from ctxext.recipe.monitors import PeriodicBlock
from ctxext.train.metrics import read_metrics
from ctxext.train.periodic import PeriodicEvaluation, Standing, watching_only

STEPS = 8
# A trained model and a rate that ruins it, so that the best step is an early one.
RUINOUS = (
    "model.source=recipes:tiny",
    f"train.steps={STEPS}",
    "train.learning_rate=0.5",
    "train.warmup=0.01",
    "train.checkpoint_every=3",
    "train.keep_checkpoints=1",
    "lora.dropout=0.1",
)


def periodic_job(folder: Path) -> tuple[Job, str]:
    """A job, and the setting of a suite for evaluations during its training."""
    job = make_job(folder)
    rows = [{"length": 100, "depths": [0.5], "samples": 1}, {"length": 240, "depths": [0.2, 0.8], "samples": 1}]
    texts = {"documents": 2, "length": 64, "haystack": "everyday"}
    suite = write_suite(folder / "during.yaml", *rows, perplexity=texts)
    return job, f'train.evaluate={{"every": 2, "suite": "{suite}"}}'


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, tuple[str, ...]]:
    """A finished training whose best step is not its last."""
    job, during = periodic_job(tmp_path_factory.mktemp("ruined"))
    settings = (*RUINOUS, during)
    extend(job.recipe(*settings), SilentReporter(), last_stage="train")
    return job, settings


def adapter_of(folder: Path, name: str = "adapter.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Lines of the evaluations without the time that they took."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run)[1]["evaluation"]]


def test_the_weights_of_the_best_step_are_kept_and_named(ruined: tuple[Job, tuple[str, ...]]) -> None:
    job, _ = ruined
    lines = evaluations(job.output)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    best = min(lines, key=lambda line: (-line["beyond_original"], line["short_loss"], line["step"]))["step"]
    assert best < STEPS, "this training does not ruin the model, so the test shows nothing"
    kept = read_json(job.output / "adapter" / "ctxext.json")["checkpoint"]
    assert (kept["step"], kept["last_step"]) == (best, STEPS)
    assert "the best of 4 evaluations" in kept["reason"]
    written = adapter_of(job.output / "adapter", "adapter_model.safetensors")
    expected = adapter_of(job.output / "checkpoints" / f"step-{best:06d}")
    last = adapter_of(job.output / "checkpoints" / f"step-{STEPS:06d}")
    assert len(written) == 56
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in written.items())


def test_the_best_checkpoint_is_not_pruned_and_others_are(ruined: tuple[Job, tuple[str, ...]]) -> None:
    job, _ = ruined
    best = read_json(job.output / "adapter" / "ctxext.json")["checkpoint"]["step"]
    folders = {path.name for path in (job.output / "checkpoints").iterdir()}
    assert folders == {f"step-{best:06d}", f"step-{STEPS:06d}"}


def test_training_has_the_same_bits_with_and_without_it(ruined: tuple[Job, tuple[str, ...]]) -> None:
    job, _ = ruined
    plain = job.folder / "plain"
    extend(job.recipe(*RUINOUS, f"output_dir={plain}"), SilentReporter(), last_stage="train")
    mine, theirs = step_lines(job.output), step_lines(plain)
    assert len(mine) == STEPS
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in mine] == [line[key] for line in theirs], key
    last = f"checkpoints/step-{STEPS:06d}/"
    for name in ("adapter.safetensors", "random.safetensors"):
        expected = load_file(plain / (last + name))
        assert expected
        found = load_file(job.output / (last + name))
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name


@pytest.mark.parametrize("left", [0, 2])
def test_an_evaluation_that_was_cut_off_is_finished_and_decides_the_same(
    ruined: tuple[Job, tuple[str, ...]], tmp_path: Path, left: int
) -> None:
    job, settings = ruined
    again = Path(shutil.copytree(job.output, tmp_path / "again"))
    shutil.rmtree(again / "adapter")
    during = again / "eval" / "during" / f"step-{STEPS:06d}"
    samples = (during / "samples.jsonl").read_text().splitlines(keepends=True)
    assert len(samples) == 3
    (during / "samples.jsonl").write_text("".join(samples[:left]))
    (during / "perplexity.json").unlink()
    reporter = SilentReporter()
    extend(job.recipe(*settings, f"output_dir={again}"), reporter, last_stage="train")
    assert [start.resumed_step for start in reporter.starts] == [STEPS]
    assert len(json_lines(during / "samples.jsonl")) == 3
    assert evaluations(again) == evaluations(job.output)
    for name in ("ctxext.json", "adapter_model.safetensors"):
        assert (again / "adapter" / name).read_bytes() == (job.output / "adapter" / name).read_bytes(), name


def test_training_ends_after_so_many_evaluations_without_a_better_one(
    ruined: tuple[Job, tuple[str, ...]], tmp_path: Path
) -> None:
    job, settings = ruined
    best = read_json(job.output / "adapter" / "ctxext.json")["checkpoint"]["step"]
    early = tmp_path / "early"
    recipe = job.recipe(*settings, "train.evaluate.stop_after=1", f"output_dir={early}")
    extend(recipe, SilentReporter(), last_stage="train")
    ended = best + 2
    assert len(step_lines(early)) == ended < STEPS
    kept = read_json(early / "adapter" / "ctxext.json")["checkpoint"]
    assert (kept["step"], kept["last_step"]) == (best, ended)
    assert "ended after 1 without a better one" in kept["reason"]
    shutil.rmtree(early / "adapter")
    extend(recipe, SilentReporter(), last_stage="train")
    assert len(step_lines(early)) == ended, "a finished training does not go on when it is resumed"
    assert read_json(early / "adapter" / "ctxext.json")["checkpoint"] == kept


def test_a_damaged_best_checkpoint_is_told_and_the_last_weights_are_kept(
    ruined: tuple[Job, tuple[str, ...]], tmp_path: Path
) -> None:
    job, settings = ruined
    best = read_json(job.output / "adapter" / "ctxext.json")["checkpoint"]["step"]
    again = Path(shutil.copytree(job.output, tmp_path / "again"))
    shutil.rmtree(again / "adapter")
    with (again / "checkpoints" / f"step-{best:06d}" / "adapter.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    extend(job.recipe(*settings, f"output_dir={again}"), SilentReporter(), last_stage="train")
    kept = read_json(again / "adapter" / "ctxext.json")["checkpoint"]
    assert kept["step"] == STEPS
    assert f"step {best} was better" in kept["reason"]
    assert "damaged" in kept["reason"]


def test_the_merged_checkpoint_says_which_step_it_is(ruined: tuple[Job, tuple[str, ...]]) -> None:
    job, settings = ruined
    extend(job.recipe(*settings), SilentReporter(), last_stage="merge")
    merged, adapter = (read_json(job.output / part / "ctxext.json")["checkpoint"] for part in ("merged", "adapter"))
    assert merged == adapter


A = Standing(10, 0.5, 8, 2.0)


@pytest.mark.parametrize(
    ("other", "better"),
    [
        (Standing(20, 0.75, 8, 9.0), True),  # needles before loss
        (Standing(20, 0.25, 8, 1.0), False),
        (Standing(20, 0.5, 8, 1.9), True),  # then the loss on short texts
        (Standing(20, 0.5, 8, 2.1), False),
        (Standing(20, 0.5, 8, 2.0), False),  # then the earlier step
        (Standing(20, 0.5, 8, None), False),
    ],
)
def test_the_best_is_chosen_by_needles_then_short_loss_then_the_earlier_step(other: Standing, better: bool) -> None:
    watching = waiting(None)
    watching._standings = [A, other]
    assert watching.best == (other if better else A)
    watching._standings = [replace(other, step=5), A]
    assert (watching.best == A) == (replace(other, step=5).rank < A.rank)


def waiting(stop_after: int | None) -> PeriodicEvaluation:
    return PeriodicEvaluation(
        PeriodicBlock(every=10, stop_after=stop_after),
        load_suite("during-training"),
        None,
        Path(),
        original_length=128,
        target_length=256,
        last_step=95,
        weights={},
        environment={},
    )


def test_patience_counts_evaluations_since_the_best() -> None:
    watching, endless = waiting(2), waiting(None)
    for scores, finished in (([0.5], False), ([0.5, 0.4], False), ([0.5, 0.4, 0.5], True), ([0.5, 0.4, 0.6], False)):
        standings = [Standing(10 * n, score, 8, 2.0) for n, score in enumerate(scores, start=1)]
        watching._standings = endless._standings = standings
        assert watching.finished is finished, scores
        assert endless.finished is False


def test_the_last_step_is_always_evaluated() -> None:
    watching = waiting(None)
    due = [step for step in range(96) if watching.due(step)]
    assert due == [*range(10, 91, 10), 95]
    job_steps = evaluated_steps(make_train(every=10, steps=95))
    assert job_steps == due


def make_train(every: int, steps: int) -> Any:
    from ctxext.recipe.train import TrainBlock

    return TrainBlock(steps=steps, evaluate=PeriodicBlock(every=every))


def test_modes_attention_and_random_numbers_are_as_before_behind_an_evaluation() -> None:
    model = tiny_model().train()
    model.model.layers[1].eval()
    model.config._attn_implementation = "flex_attention"
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)

    def fails() -> None:
        with watching_only(model):
            assert not any(module.training for module in model.modules())
            assert model.config._attn_implementation == "sdpa"
            torch.rand(100)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "flex_attention"
    assert torch.equal(torch.rand(2), expected)


def test_a_suite_that_cannot_decide_is_refused_before_any_work(tmp_path: Path) -> None:
    job, _ = periodic_job(tmp_path)
    short = write_suite(tmp_path / "short.yaml", {"length": 100, "depths": [0.5], "samples": 1})
    with pytest.raises(UsageError, match="no needle beyond the original length"):
        make_plan(job.recipe(f'train.evaluate={{"every": 2, "suite": "{short}"}}'))
    with pytest.raises(UsageError, match="unknown suite"):
        make_plan(job.recipe('train.evaluate={"every": 2, "suite": "no-such-suite"}'))


def test_the_plan_counts_it_and_its_suite_belongs_to_the_plan(tmp_path: Path) -> None:
    job, during = periodic_job(tmp_path)
    plain, plan = make_plan(job.recipe()), make_plan(job.recipe(during))
    assert plan.train_flops > plain.train_flops
    assert plan.plan_id != plain.plan_id
    write_suite(tmp_path / "during.yaml", {"length": 240, "depths": [0.5], "samples": 1})
    assert make_plan(job.recipe(during)).plan_id != plan.plan_id


def test_the_shipped_suite_is_small_and_lies_beyond_the_original_length() -> None:
    suite = load_suite("during-training")
    for original, target in ((8192, 16384), (128, 512), (8192, 131072)):
        deciding = deciding_samples(suite, original, target)
        assert len(deciding) == 6
        assert {sample.cell.length_tokens + suite.num_answer_tokens for sample in deciding} == {target}
    assert suite.perplexity is not None
    assert json.dumps(suite.model_dump(mode="json"))
