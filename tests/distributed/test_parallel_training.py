"""Two real processes that share windows, weights or one window's tokens train like one process, and resume exactly."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from support import Job, SilentReporter, child_environment, make_job, save_tiny_model, step_lines
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ctxext.pipeline.extend import extend
from ctxext.pipeline.recipes import recipe_of
from ctxext.recipe.schema import Recipe

# Two processes with two passes each, or one group with four: gradients are accumulated in every way of sharing.
SETTINGS = (
    "train.steps=4",
    "train.windows_per_step=4",
    "train.checkpoint_every=2",
    "train.keep_checkpoints=4",
    "train.activation_checkpointing=true",
    "train.memory.tile_tokens=32",
    "train.allow_slow=true",  # so that neither these savings are judged by the clock, nor the ring on a CPU refused
)
WAYS = {
    "ddp": ("parallel.shard=none",),
    "fsdp2": ("parallel.shard=fsdp2",),
    "ulysses": ("parallel.sequence=2",),
    "ulysses-fsdp2": ("parallel.sequence=2", "parallel.shard=fsdp2"),
    "ring": ("parallel.sequence=2", "parallel.sequence_engine=ring"),
    # Frozen weights in bfloat16 beside float32 ones that train whole, and computed with rounded.
    "fsdp2-mixed": ("parallel.shard=fsdp2", "model.dtype=bfloat16", "lora.embeddings_and_norms=true"),
    "fsdp2-full": ("parallel.shard=fsdp2", "adaptation=full", "lora={}"),
    # The base in 4 bits: gathered again for the backward pass, and there for a repeated forward pass or not.
    "fsdp2-qlora": ("parallel.shard=fsdp2", "adaptation=qlora"),
    "fsdp2-qlora-kept": ("parallel.shard=fsdp2", "adaptation=qlora", "train.activation_checkpointing=false"),
}
# The run of one process that a way is compared with, and what it has in common with it.
ALONE = {
    "ring": ("one-ring", ()),
    "fsdp2-mixed": ("one-mixed", WAYS["fsdp2-mixed"][1:]),
    "fsdp2-full": ("one-full", WAYS["fsdp2-full"][1:]),
    "fsdp2-qlora": ("one-qlora", WAYS["fsdp2-qlora"][1:]),
    "fsdp2-qlora-kept": ("one-qlora", WAYS["fsdp2-qlora"][1:]),
}
# What a setting needs: module, and package.
NEEDED = {
    "parallel.sequence=2": ("ringmaster", "axolotl-ringmaster"),
    "adaptation=qlora": ("bitsandbytes", "bitsandbytes"),
}
LINEAR = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # weights of linear layers of the model with grouped heads


def missing_package(way: str) -> str | None:
    for setting in WAYS[way]:
        module, package = NEEDED.get(setting, ("torch", "torch"))
        if importlib.util.find_spec(module) is None:
            return package
    return None


def recipe_in(folder: Path, way: str, output: Path) -> Recipe:
    """The ring's blocks on a CPU are for as many key heads as query heads; everything else shares key heads."""
    model = folder / "models" / ("equal-heads" if "ring" in way else "grouped-heads")
    own = WAYS[way] if way in WAYS else dict(ALONE.values()).get(way, ())
    settings = [*SETTINGS, f"model.source={model}", f"output_dir={output}", *own]
    return recipe_of(str(folder / "recipe.yaml"), settings)


def train(recipe: Recipe, reporter: SilentReporter) -> None:
    AcceleratorState._reset_state()  # a process keeps the precision of its first run
    extend(recipe, reporter, last_stage="train")


def train_every_way(place: str, ways: list[str]) -> None:
    """What each of the two processes runs; leaves a file that says what share of the trained weights it holds."""
    folder = Path(place)
    for way in ways:
        held: dict[str, int] = {}
        gc.collect()  # models of the ways before

        def note(metrics: object, held: dict[str, int] = held) -> None:
            held["sharded_modules"] = sum(isinstance(found, FSDPModule) for found in gc.get_objects())
            parameters = [found for found in gc.get_objects() if isinstance(found, torch.nn.Parameter)]
            shared = [found for found in parameters if isinstance(found, DTensor) and found.requires_grad]
            held["whole"] = sum(found.numel() for found in shared)
            held["mine"] = sum(found.to_local().numel() for found in shared)
            frozen = [found for found in parameters if isinstance(found, DTensor) and not found.requires_grad]
            held["frozen"] = sum(found.numel() for found in frozen)
            held["my_frozen"] = sum(found.to_local().numel() for found in frozen)

        train(recipe_in(folder, way, folder / way), SilentReporter(on_step=note))
        (folder / way / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(held))
        if way in ("fsdp2", "ulysses"):  # once more from the middle, as after an interruption
            again = folder / f"{way}-resumed"
            if torch.distributed.get_rank() == 0:
                shutil.copytree(folder / way, again)
                for gone in ("adapter", "checkpoints/step-000004"):
                    shutil.rmtree(again / gone)
            torch.distributed.barrier()
            train(recipe_in(folder, way, again), SilentReporter())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one process a model, and a run of two a way of sharing."""
    folder = tmp_path_factory.mktemp("parallel")
    job: Job = make_job(folder)
    save_tiny_model(folder / "models" / "grouped-heads", num_attention_heads=4, num_key_value_heads=2)
    save_tiny_model(folder / "models" / "equal-heads", num_attention_heads=4, num_key_value_heads=4)
    assert job.recipe_path == folder / "recipe.yaml"
    ways = [way for way in WAYS if missing_package(way) is None]
    # A fresh interpreter forks the two: this one may hold threads, which do not survive a fork.
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, __file__, str(folder), *ways],
        env=child_environment(PYTHONPATH=path),
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr
    for name in {ALONE[way][0] if way in ALONE else "one" for way in ways}:
        train(recipe_in(folder, name, folder / name), SilentReporter())
    return folder


def run_of(runs: Path, way: str) -> Path:
    if (missing := missing_package(way)) is not None:
        pytest.skip(f"{missing} is not installed")
    return runs / way


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_losses_weights_and_moments_of_one(runs: Path, way: str) -> None:
    run, one = run_of(runs, way), runs / (ALONE[way][0] if way in ALONE else "one")
    rounding = 40 if way == "fsdp2-mixed" else 1  # sums of bfloat16 products in another order
    weights = "trained/model" if way == "fsdp2-full" else "adapter/adapter_model"
    mine, theirs = (step_lines(folder) for folder in (run, one))
    assert [line["step"] for line in mine] == [1, 2, 3, 4]
    for line, expected in zip(mine, theirs, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=rounding * 1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=rounding * 1e-4)
        assert line["num_tokens"] == expected["num_tokens"]
    for name in (weights, "checkpoints/step-000004/optimizer", "checkpoints/step-000004/adapter"):
        found, wanted = (load_file(folder / f"{name}.safetensors") for folder in (run, one))
        assert found.keys() == wanted.keys()
        assert len(wanted) >= 20
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype
            assert float((found[key] - tensor).abs().max()) < rounding * 1e-5, (name, key)


@pytest.mark.parametrize("way", ["fsdp2", "ulysses-fsdp2", "fsdp2-qlora"])
def test_with_shared_weights_a_process_holds_half_of_them(runs: Path, way: str) -> None:
    held = [json.loads((run_of(runs, way) / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for facts in held:
        assert facts["sharded_modules"] == 3  # two layers, and everything else
        assert facts["mine"] * 2 == facts["whole"] > 0
        assert facts["my_frozen"] * 2 == facts["frozen"] > 0
    unshared = json.loads((runs / "ddp" / "rank-0.json").read_text())
    assert set(unshared.values()) == {0}


def test_weights_in_4_bits_are_shared_as_they_lie_in_memory(runs: Path) -> None:
    plain, quantised = (
        json.loads((run_of(runs, way) / "rank-1.json").read_text())["frozen"] for way in ("fsdp2", "fsdp2-qlora")
    )
    assert plain - quantised == LINEAR * 7 // 8  # half a byte each instead of four


@pytest.mark.parametrize("way", ["fsdp2", "ulysses"])
def test_a_resumed_run_ends_with_the_same_bits(runs: Path, way: str) -> None:
    run, again = run_of(runs, way), runs / f"{way}-resumed"
    kept = ("loss", "grad_norm", "num_tokens")
    through, resumed = ([{key: line[key] for key in kept} for line in step_lines(folder)] for folder in (run, again))
    assert resumed == through
    for name in ("adapter/adapter_model", "checkpoints/step-000004/optimizer"):
        expected, found = (load_file(folder / f"{name}.safetensors") for folder in (run, again))
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (name, key)


if __name__ == "__main__":
    gc.freeze()  # a collection in the forked processes would copy every page of the libraries
    debug_launcher(train_every_way, args=(sys.argv[1], sys.argv[2:]), num_processes=2)
