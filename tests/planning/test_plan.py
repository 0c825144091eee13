"""A plan's numbers follow from recipe and config alone, and its id changes exactly when results would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import Job, make_job, tiny_model

from ctxext.errors import RecipeError, UsageError
from ctxext.evaluation.suite import stored_suite
from ctxext.model.lora import add_lora
from ctxext.planning.cost import ModelShape, estimated_seconds, measured_flops_per_second
from ctxext.planning.plan import Plan, arms_of, length_checks, make_plan, suite_check
from ctxext.recipe.schema import LoraBlock

CONTROL = ("rope.method=none", "rope.control=true")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def plan(job: Job) -> Plan:
    return make_plan(job.recipe())


def test_lengths_and_tokens_follow_from_recipe_and_config(plan: Plan) -> None:
    assert (plan.original_length, plan.target_length, plan.factor) == (128, 256, 2.0)
    assert (plan.method, plan.model_type, plan.window_mode) == ("yarn", "llama", "skip-wise")
    assert (plan.window_tokens, plan.windows_per_step, plan.steps) == (96, 2, 4)
    assert plan.train_tokens == 4 * 2 * 96
    assert plan.facts_share == 0.5
    assert plan.attention_factor == pytest.approx(1.0693147)
    assert plan.rope_parameters["original_max_position_embeddings"] == 128


def test_parameters_are_counted_as_the_real_model_has_them(plan: Plan) -> None:
    model = tiny_model()
    assert plan.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.merged_bytes == plan.num_parameters * 4
    wrapped = add_lora(model, LoraBlock(rank=4, alpha=8.0), seed=0)
    trainable = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert plan.num_trainable == trainable
    # Weights, gradients and both moments of AdamW in float32.
    assert plan.trainable_bytes == trainable * 4 * 4


def test_the_cache_of_the_longest_prompt_is_what_a_model_fills(plan: Plan) -> None:
    with torch.no_grad():
        cache = tiny_model()(torch.zeros(1, plan.longest_prompt, dtype=torch.long), use_cache=True).past_key_values
    filled = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert plan.cache_bytes == filled


def test_evaluation_counts_all_prompts_of_the_suite(plan: Plan) -> None:
    assert plan.num_samples == 4
    assert plan.prefill_tokens == 2 * 100 + 2 * 240
    assert plan.longest_prompt == 240
    assert stored_suite(plan.suite).haystack == "generated-words"


def test_the_plan_can_be_stored(plan: Plan) -> None:
    assert Plan(**plan.to_json()) == plan


def test_auto_attention_is_said_as_what_it_became(job: Job, plan: Plan) -> None:
    assert plan.attention.startswith("sdpa (plainly causal")
    windows = ("data.windows.mode=full-length", "data.windows.length=null", "data.windows.positions=per-document")
    assert make_plan(job.recipe(*windows)).attention.startswith("ctxext_documents (isolated documents")
    elsewhere = ("train.memory.device_gib=80", "train.attention=flash_attention_2")
    assert make_plan(job.recipe(*elsewhere)).attention == "flash_attention_2 (as asked)"


def test_attention_that_cannot_run_is_refused_before_any_weight_is_loaded(job: Job) -> None:
    with pytest.raises(UsageError, match=r"train\.attention: flash_attention_2 has no kernels for CPU"):
        make_plan(job.recipe("train.attention=flash_attention_2"))


SAME_RESULTS = [
    "output_dir=elsewhere",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=5",
    "train.trackers=[tensorboard]",
    "evaluation.before=false",
    "evaluation.control=true",
]
OTHER_RESULTS = [
    "target_length=512",
    "rope.method=linear",
    "rope={method: yarn, beta_fast: 16}",
    "train.steps=5",
    "train.seed=1",
    "train.learning_rate=0.02",
    "train.windows_per_step=4",
    "lora.rank=8",
    "data.seed=1",
    "data.facts=null",
    "data.facts.share=0.6",
    "data.windows.length=128",
    "model.dtype=bfloat16",
]


@pytest.mark.parametrize("override", SAME_RESULTS)
def test_settings_that_change_no_result_keep_the_id(override: str, job: Job, plan: Plan) -> None:
    assert make_plan(job.recipe(override)).plan_id == plan.plan_id


@pytest.mark.parametrize("override", OTHER_RESULTS)
def test_settings_that_change_results_change_the_id(override: str, job: Job, plan: Plan) -> None:
    assert make_plan(job.recipe(override)).plan_id != plan.plan_id


def test_equal_settings_change_nothing_but_time(job: Job, plan: Plan) -> None:
    assert make_plan(job.recipe()) == plan


@pytest.mark.parametrize(
    ("overrides", "arms"),
    [
        ((), ["base", "extended"]),
        (("evaluation.before=false",), ["extended"]),
        (("evaluation.untrained=true", "evaluation.control=true"), ["base", "untrained", "extended", "control"]),
        (CONTROL, ["base", "control"]),
    ],
)
def test_the_arms_come_in_order(overrides: tuple[str, ...], arms: list[str], job: Job) -> None:
    assert arms_of(job.recipe(*overrides)) == arms
    planned = make_plan(job.recipe(*overrides))
    assert planned.arms == arms
    shape = ModelShape(planned.num_parameters, 2, 32)
    assert 0 < planned.evaluation_flops <= len(arms) * planned.num_samples * shape.prefill_flops(240)


def problems(job: Job, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        job.recipe(*overrides)
    return caught.value.problems


def test_everything_between_recipe_and_model_is_reported_together(job: Job) -> None:
    found = problems(job, "target_length=100", "rope.factor=3", "train.steps=0", "evaluation.suite=quik")
    assert len(found) == 5
    text = "\n".join(found)
    assert "train.steps" in text
    assert "100 is not above the model's original length 128" in text
    assert "rope.factor: 3 contradicts target_length 100" in text
    assert "Did you mean 'quick" in text


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model": None, "rope": None, "target_length": None},
        {"model": {"source": 5}, "target_length": 256},
        {"model": {"source": ""}, "rope": {"factor": "x"}, "target_length": 256},
        {"model": {"source": "./nowhere"}, "target_length": True},
        {"model": ["source"], "target_length": -1},
        {"evaluation": {"suite": None}},
        {"evaluation": []},
    ],
)
def test_checks_are_silent_about_what_the_schema_refuses(values: dict[str, object]) -> None:
    found = [*length_checks(values), *suite_check(values)]
    assert [path for path, _ in found] in ([], [("model", "source")])


def test_a_plan_without_a_longer_target_is_refused(job: Job) -> None:
    recipe = job.recipe().model_copy(update={"target_length": 128})
    with pytest.raises(UsageError, match="target_length"):
        make_plan(recipe)


def test_costs_are_the_published_formulas() -> None:
    shape = ModelShape(num_matrix_parameters=1000, num_layers=3, attention_width=16)
    assert shape.prefill_flops(10) == 2 * 1000 * 10 + 2 * 3 * 16 * 100
    assert shape.train_flops(10, False) == 2 * 20_000 + 3.5 * 9600
    assert shape.train_flops(10, True) == shape.train_flops(10, False) + shape.prefill_flops(10)


def test_time_is_flops_over_a_speed_that_was_measured_here() -> None:
    speed = measured_flops_per_second(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e6 < speed < 1e16
    assert estimated_seconds(7e9, 1e10) == pytest.approx(1.0)


def test_a_model_folder_is_not_touched_by_planning(job: Job) -> None:
    folder = Path(job.recipe().model.source)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make_plan(job.recipe("train.seed=3"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
