"""What `parallel` becomes, and what is refused before anything is loaded or started."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import Job, make_job, save_tiny_model

from ctxext.errors import RecipeError, UsageError
from ctxext.planning.parallel_plan import ParallelPlan, plan_parallel
from ctxext.planning.plan import make_plan
from ctxext.train.step import SummedLoss

ELSEWHERE = "train.memory.device_gib=80"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("plans")
    made = make_job(folder)
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
    save_tiny_model(folder / "models" / "tiny", **shape)
    save_tiny_model(folder / "models" / "large", **{**shape, "hidden_size": 1024, "num_hidden_layers": 8})
    return made


def plan_of(job: Job, *settings: str) -> ParallelPlan:
    recipe = job.recipe("train.windows_per_step=16", *settings)
    return plan_parallel(recipe, SummedLoss)


def test_windows_are_divided_among_groups_and_passes(job: Job) -> None:
    plan = plan_of(job, ELSEWHERE, "parallel.processes=8", "parallel.sequence=2", "train.windows_per_device=2")
    assert (plan.replicas, plan.windows, plan.passes) == (4, 4, 2)
    assert plan.describe() == (
        "8 processes; all weights in every process (DDP): they fit; groups of 2 share a window (ulysses); a step is "
        "4 windows for every group, in 2 passes"
    )
    assert (plan.sharding.weights, plan.sharding.sequence) == (1, 2)
    assert ParallelPlan(**plan.to_json()) == plan
    assert plan_of(job).describe() == "one process"


def test_weights_are_shared_where_they_do_not_fit_and_only_there(job: Job) -> None:
    large = f"model.source={job.folder / 'models' / 'large'}"
    small = plan_of(job, large, "train.memory.device_gib=0.05", "parallel.processes=4")
    assert small.sharded
    assert small.reason == "they do not fit one device"
    assert small.sharding.weights == 4
    assert plan_of(job, large, "train.memory.device_gib=0.02", "parallel.processes=4", "adaptation=qlora").sharded
    assert not plan_of(job, large, ELSEWHERE, "parallel.processes=4").sharded
    assert plan_of(job, large, ELSEWHERE, "parallel.processes=4", "parallel.shard=fsdp2").sharded
    assert not plan_of(job, large, "train.memory.device_gib=0.05").sharded
    with pytest.raises(UsageError, match="needs a process that holds all weights"):
        plan_of(job, large, "train.memory.device_gib=0.05", "parallel.processes=4", "train.evaluate={every: 2}")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["parallel.processes=3"], "multiple of processes x windows_per_device"),
        (["parallel.sequence=2"], "expected a divisor of the 1 processes"),
        (["parallel.shard=fsdp2"], "one process, with nobody to share"),
        (["parallel.processes=2", "parallel.shard=fsdp2", "train.optimizer=adamw-8bit"], "8-bit moments"),
        (["parallel.processes=2", "parallel.shard=fsdp2", "train.compile=true"], "train.compile"),
        (
            [
                "parallel.processes=2",
                "parallel.shard=fsdp2",
                "adaptation=qlora",
                "lora.weight_decomposed=true",
            ],
            "starts from 4-bit weights",
        ),
        (["parallel.processes=8", "parallel.sequence=8"], "num_key_value_heads is 4"),
        (["parallel.processes=4", "parallel.sequence=4", "data.windows.length=90"], "windows of 90 tokens"),
        (["parallel.processes=2", "parallel.sequence=2", "train.compile=true"], "train.compile"),
        (
            [
                "parallel.processes=2",
                "parallel.sequence=2",
                "data.windows={mode: full-length, positions: per-document}",
            ],
            "see only themselves",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_the_plan_with_its_reason(job: Job, settings: list[str], reason: str) -> None:
    recipe = job.recipe("train.windows_per_step=16", ELSEWHERE, *settings)
    with pytest.raises(UsageError, match=reason):
        make_plan(recipe)


@pytest.mark.parametrize(
    "settings",
    [["parallel.processes=6", "parallel.sequence=4"], ["parallel.processes=1", "parallel.shard=fsdp2"]],
)
def test_what_contradicts_itself_is_refused_by_the_recipe(job: Job, settings: list[str]) -> None:
    with pytest.raises(RecipeError, match="parallel"):
        job.recipe(*settings)


def test_models_with_other_attention_than_plain_do_not_share_windows(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    folder = save_tiny_model(tmp_path / "models" / "sliding", num_attention_heads=4, num_key_value_heads=2)
    config = (folder / "config.json").read_text()
    sliding = config.replace('"model_type": "llama"', '"model_type": "mistral", "sliding_window": 64')
    (folder / "config.json").write_text(sliding.replace("LlamaForCausalLM", "MistralForCausalLM"))
    recipe = job.recipe(
        f"model.source={folder}", ELSEWHERE, "parallel.processes=2", "parallel.sequence=2", "train.windows_per_step=2"
    )
    with pytest.raises(UsageError, match="another kind than full attention"):
        make_plan(recipe)


def test_on_a_cpu_the_ring_must_be_allowed_to_be_slow(job: Job) -> None:
    pytest.importorskip("ringmaster")
    settings = ["parallel.processes=2", "parallel.sequence=2", "parallel.sequence_engine=ring"]
    with pytest.raises(UsageError, match=r"train\.allow_slow=true"):
        plan_of(job, *settings)
    assert plan_of(job, *settings, "train.allow_slow=true").engine == "ring"
