"""Adapter, merged checkpoint and what stock programs load are one and the same model; whatever is not is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import SilentReporter, child_environment, file_size_limit, make_job, save_tiny_model
from torch import Tensor
from transformers import AutoConfig

from ctxext.errors import ArtefactError, ResourceError
from ctxext.export.merge import merge_adapter
from ctxext.files import verify_manifest, write_manifest
from ctxext.model.load import load_config, load_model, resolve_source
from ctxext.pipeline.extend import extend
from ctxext.rope.patchers import extend_config
from ctxext.train.adapter import adapter_config, load_adapter

CPU = torch.device("cpu")
IDS = (torch.arange(40) * 37 + 5) % 256
POSITIONS = torch.cat([torch.arange(20), torch.arange(236, 256)])
LOADED_BY_STOCK_PROGRAMS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert AutoTokenizer.from_pretrained(sys.argv[1]).model_max_length == 256
ids, positions = torch.load(sys.argv[2])
with torch.no_grad():
    logits = model(ids[None], position_ids=positions[None], attention_mask=torch.ones_like(ids[None])).logits
torch.save(logits, sys.argv[3])
assert not [name for name in sys.modules if name.split(".")[0] in ("ctxext", "peft")]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base at `models/tiny`, named relatively, and a run that trained an adapter on it."""
    folder = tmp_path_factory.mktemp("merge")
    job = make_job(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = job.recipe("model.source=models/tiny", "output_dir=run", "train.steps=3")
        extend(recipe, SilentReporter(), last_stage="train")
        merge_adapter(folder / "run" / "adapter", folder / "merged", "float32")
    return folder


@pytest.fixture(autouse=True)
def _beside_the_base(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    return Path(shutil.copytree(trained / "run" / "adapter", tmp_path / "adapter"))


def adapted(adapter: Path) -> PeftModel:
    config = adapter_config(adapter)
    return load_adapter(adapter, load_model(resolve_source("models/tiny"), config, dtype=torch.float32, device=CPU))


def logits(model: Callable[..., object]) -> Tensor:
    with torch.no_grad():
        output = model(IDS[None], position_ids=POSITIONS[None], attention_mask=torch.ones_like(IDS[None]))
    result: Tensor = output.logits  # type: ignore[attr-defined]
    return result


def test_adapter_and_merged_checkpoint_give_equal_logits_where_nothing_of_ctxext_is_loaded(
    trained: Path, tmp_path: Path
) -> None:
    expected = logits(adapted(trained / "run" / "adapter").eval())
    torch.save((IDS, POSITIONS), tmp_path / "prompt.pt")
    arguments = [str(trained / "merged"), str(tmp_path / "prompt.pt"), str(tmp_path / "logits.pt")]
    command = [sys.executable, "-c", LOADED_BY_STOCK_PROGRAMS, *arguments]
    subprocess.run(command, check=True, env=child_environment(), cwd=tmp_path, timeout=300)
    reloaded = torch.load(tmp_path / "logits.pt")
    assert float((reloaded - expected).abs().max()) < 1e-4
    base = load_model(
        resolve_source("models/tiny"), load_config(resolve_source("models/tiny")), dtype=torch.float32, device=CPU
    )
    assert float((logits(base) - expected).abs().max()) > 0.05


def test_the_merged_config_holds_both_forms_and_they_agree(trained: Path) -> None:
    config = json.loads((trained / "merged" / "config.json").read_text())
    parameters = dict(config["rope_parameters"])
    assert config["max_position_embeddings"] == 256
    assert parameters["rope_type"] == "yarn"
    assert (parameters["factor"], parameters["original_max_position_embeddings"]) == (2.0, 128)
    assert config["rope_theta"] == parameters.pop("rope_theta") == 10000.0
    assert config["rope_scaling"] == parameters
    assert "rope_theta" not in config["rope_scaling"]


@pytest.mark.parametrize("kept", ["rope_parameters", "rope_scaling"])
def test_either_form_alone_reads_as_the_same_positions(trained: Path, tmp_path: Path, kept: str) -> None:
    config = json.loads((trained / "merged" / "config.json").read_text())
    expected = AutoConfig.from_pretrained(trained / "merged").rope_parameters
    for key in {"rope_parameters", "rope_scaling", "rope_theta"}:
        if (key == "rope_parameters") != (kept == "rope_parameters"):
            del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == expected


def test_no_file_names_a_path_of_this_machine(trained: Path) -> None:
    checked = 0
    for folder in (trained / "run" / "adapter", trained / "merged"):
        for path in folder.glob("*.json"):
            text = path.read_text()
            checked += 1
            for foreign in (str(trained), "site-packages", sys.prefix, str(Path.home()), "/tmp/"):
                assert foreign not in text, (path.name, foreign)
    assert checked >= 9
    assert json.loads((trained / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "models/tiny"
    )


def test_an_adapter_travels_with_the_config_it_was_trained_under(trained: Path) -> None:
    folder = trained / "run" / "adapter"
    config = adapter_config(folder)
    assert (config.max_position_embeddings, config.rope_parameters["rope_type"]) == (256, "yarn")
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "ctxext.json",
        "manifest.json",
    }


def test_peft_opens_the_adapter_as_it_is(trained: Path) -> None:
    expected = logits(adapted(trained / "run" / "adapter").eval())
    base = load_model(
        resolve_source("models/tiny"), adapter_config(trained / "run" / "adapter"), dtype=torch.float32, device=CPU
    )
    opened = PeftModel.from_pretrained(base, trained / "run" / "adapter").eval()
    assert torch.equal(logits(opened), expected)


@pytest.mark.parametrize("method", ["unscaled", "linear", "another factor"])
def test_an_adapter_on_a_base_with_other_positions_is_refused(adapter: Path, method: str) -> None:
    config = load_config(resolve_source("models/tiny"))
    if method == "linear":
        config = extend_config(config, method="linear", target_length=256)
    elif method == "another factor":
        config = extend_config(config, target_length=512)
    model = load_model(resolve_source("models/tiny"), config, dtype=torch.float32, device=CPU)
    with pytest.raises(ArtefactError, match="RoPE is not the one the adapter was trained with"):
        load_adapter(adapter, model)


def tampered(adapter: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Other weights under a manifest that agrees with them."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    write_manifest(adapter)
    return adapter


def remove_one(tensors: dict[str, Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def add_one(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)


def reshape_one(tensors: dict[str, Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = tensors[name][:2].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [(remove_one, "1 weights missing, 0 unknown"), (add_one, "0 weights missing, 1 unknown"), (reshape_one, "shape")],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(
    adapter: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    with pytest.raises(ArtefactError, match=message):
        merge_adapter(tampered(adapter, change), tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_truncated_tensors_are_refused_even_under_an_agreeing_manifest(adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtefactError, match="cut short"):
        merge_adapter(adapter, tmp_path / "out")
    write_manifest(adapter)
    with pytest.raises(ArtefactError, match="could not read the tensors"):
        merge_adapter(adapter, tmp_path / "out")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "config.json", "ctxext.json", "adapter_config.json"])
def test_one_flipped_bit_anywhere_is_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    data = bytearray((adapter / name).read_bytes())
    data[-5] ^= 1
    (adapter / name).write_bytes(data)
    with pytest.raises(ArtefactError, match=re.escape(name)):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_adapter_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="folder not found"):
        merge_adapter(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"no ctxext\.json"):
        merge_adapter(trained / "models" / "tiny", tmp_path / "out")
    with pytest.raises(ArtefactError, match="not an adapter folder"):
        merge_adapter(trained / "merged", tmp_path / "out")


def test_an_existing_destination_is_refused_and_untouched(adapter: Path, tmp_path: Path) -> None:
    destination = tmp_path / "out"
    destination.mkdir()
    (destination / "mine.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="destination exists already"):
        merge_adapter(adapter, destination)
    assert [path.name for path in destination.iterdir()] == ["mine.txt"]


def test_a_merge_that_runs_out_of_disk_leaves_no_half_folder(adapter: Path, tmp_path: Path) -> None:
    with file_size_limit(20_000), pytest.raises(ResourceError, match="could not write"):
        merge_adapter(adapter, tmp_path / "out", "float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    merge_adapter(adapter, tmp_path / "out", "float32")
    verify_manifest(tmp_path / "out")


@pytest.mark.parametrize("changes", [{"seed": 5}, {"num_hidden_layers": 3}], ids=str)
def test_a_base_whose_weights_changed_after_training_is_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]
) -> None:
    save_tiny_model(tmp_path / "models" / "tiny", **changes)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtefactError, match="weights are not the ones that were trained on"):
        merge_adapter(adapter, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_bfloat16_merges_stay_within_their_rounding(trained: Path, tmp_path: Path) -> None:
    proof = merge_adapter(trained / "run" / "adapter", tmp_path / "out", "bfloat16")
    assert proof.largest_logit_difference > 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
