"""Checkpoints: back to the bit, damaged ones passed over aloud, the old removed only once the new is safe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import SilentReporter, file_size_limit, make_job
from torch import Tensor

from ctxext.errors import ResourceError
from ctxext.pipeline.extend import extend
from ctxext.train.checkpoint import (
    TrainState,
    checkpoint_path,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    set_optimizer_tensors,
)

STATE = TrainState(step=2, decides={"train.seed": 0}, data_sha256="data", num_processes=1)


def tensors(seed: int, count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {f"layer.{i}.weight": torch.randn(16, 8, generator=generator) for i in range(count)}
    made["half"] = torch.randn(5, generator=generator).to(torch.bfloat16)
    made["odd"] = torch.tensor([float("-0.0"), 1e-45, float("inf")])
    return made


def save(folder: Path, step: int, keep: int = 2, seed: int | None = None) -> Path:
    state = TrainState(step, STATE.decides, STATE.data_sha256, STATE.num_processes)
    number = step if seed is None else seed
    random_states = {"cpu": torch.get_rng_state()[None]}
    return save_checkpoint(folder, state, tensors(number), tensors(number + 1000), random_states, keep)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    save(tmp_path, 2)
    checkpoint, messages = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert messages == []
    assert checkpoint.state == STATE
    for stored, expected in ((checkpoint.adapter, tensors(2)), (checkpoint.optimizer, tensors(1002))):
        assert stored.keys() == expected.keys()
        for name, tensor in expected.items():
            assert stored[name].dtype == tensor.dtype
            assert stored[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name
    assert torch.equal(checkpoint.random_states["cpu"][0], torch.get_rng_state())


def test_optimizer_moments_come_back_to_the_bit_and_go_on_equally() -> None:
    def parameters() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(3)]

    def advance(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()

    one = parameters()
    first = torch.optim.AdamW(one, lr=0.1)
    advance(first, one, 1)
    two = [torch.nn.Parameter(weight.detach().clone()) for weight in one]
    second = torch.optim.AdamW(two, lr=0.1)
    set_optimizer_tensors(second, {name: tensor.clone() for name, tensor in optimizer_tensors(first).items()})
    for seed in (2, 3):
        advance(first, one, seed)
        advance(second, two, seed)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_a_damaged_checkpoint_is_passed_over_aloud_for_the_older_one(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 2)
    file = save(tmp_path, 4) / name
    data = bytearray(file.read_bytes())
    if damage == "removed":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[:-3])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    checkpoint, messages = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state.step == 2
    assert len(messages) == 1
    assert "skipped a damaged checkpoint" in messages[0]
    assert "step-000004" in messages[0]


def test_a_manifest_that_is_not_one_counts_as_damage(tmp_path: Path) -> None:
    save(tmp_path, 2)
    for broken in ("", "[]", '{"files": {"state.json": {}}}', '{"files": 3}', '{"files": {"state.json": 7}}'):
        (save(tmp_path, 4) / "manifest.json").write_text(broken)
        checkpoint, messages = newest_checkpoint(tmp_path)
        assert checkpoint is not None
        assert (checkpoint.state.step, len(messages)) == (2, 1), broken


def test_a_checkpoint_without_its_manifest_was_never_finished(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (save(tmp_path, 4) / "manifest.json").unlink()
    checkpoint, messages = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.state.step, len(messages)) == (2, 1)


def test_a_save_killed_between_commit_and_pruning_is_pruned_by_the_next(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    save(tmp_path, 8, keep=2)
    assert steps(tmp_path) == [6, 8]


def test_a_checkpoint_holds_what_trains_and_nothing_of_the_base(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    extend(job.recipe("train.steps=2"), SilentReporter(), last_stage="train")
    folder = checkpoint_path(job.output / "checkpoints", 2)
    names = {path.name for path in folder.iterdir()}
    tensors_of = {name: load_file(folder / f"{name}.safetensors") for name in ("adapter", "optimizer", "random")}
    others = {"state.json", "monitors.json", "manifest.json"}
    assert names == {*(f"{name}.safetensors" for name in tensors_of), *others}
    assert len(tensors_of["adapter"]) == 28
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors_of["adapter"])
    assert {name.split(".")[1] for name in tensors_of["optimizer"]} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(tensors_of["optimizer"]) == 3 * 28
    assert tensors_of["random"].keys() == {"cpu"}


def test_without_any_whole_checkpoint_training_starts_over_and_says_why(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") == (None, [])
    for step in (2, 4):
        (save(tmp_path, step) / "state.json").unlink()
    checkpoint, messages = newest_checkpoint(tmp_path)
    assert checkpoint is None
    assert len(messages) == 2


def test_the_oldest_beyond_keep_is_removed(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [6, 8]


def test_nothing_is_removed_before_the_new_checkpoint_is_whole(tmp_path: Path) -> None:
    save(tmp_path, 2, keep=1)
    with file_size_limit(1000), pytest.raises(ResourceError, match="could not write"):
        save(tmp_path, 4, keep=1)
    assert steps(tmp_path) == [2]
    checkpoint, messages = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.state.step, messages) == (2, [])


def test_a_damaged_newer_checkpoint_never_displaces_a_whole_one(tmp_path: Path) -> None:
    save(tmp_path, 2, keep=1)
    (save(tmp_path, 8, keep=2) / "state.json").write_text("{")
    save(tmp_path, 4, keep=1)
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state.step == 4


def test_leftovers_of_a_killed_writer_are_removed_and_never_read(tmp_path: Path) -> None:
    save(tmp_path, 2)
    leftover = tmp_path / "step-000004.partial-123-abcd"
    leftover.mkdir()
    (leftover / "adapter.safetensors").write_bytes(b"half")
    checkpoint, messages = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.state.step, messages) == (2, [])
    assert not leftover.exists()


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 2, seed=1)
    save(tmp_path, 2, seed=7)
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert torch.equal(checkpoint.adapter["layer.0.weight"], tensors(7)["layer.0.weight"])
