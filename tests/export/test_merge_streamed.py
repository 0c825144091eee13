"""A merge that holds a block of rows at a time gives what peft gives in memory; what only looks like it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import ORIGINAL_LENGTH, TARGET_LENGTH, byte_tokenizer, file_size_limit, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from ctxext.errors import ArtefactError, PositionsNotInEffectError, ResourceError
from ctxext.export import merge, proof, stream
from ctxext.export.merge import NotStreamableError, merge_adapter, merge_streamed, write_merged
from ctxext.export.stream import checkpoint_tensors
from ctxext.files import read_json, verify_manifest, write_json_atomic
from ctxext.model.load import load_config, load_model, load_tokenizer, quiet, resolve_source, weights_fingerprint
from ctxext.rope.patchers import extend_config
from ctxext.train.adapter import adapter_config, load_adapter, read_provenance, save_adapter

CPU = torch.device("cpu")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "alpha / rank": {"r": 4, "lora_alpha": 12},
    "alpha / sqrt(rank)": {"r": 4, "lora_alpha": 12, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 12,
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 1},
        "alpha_pattern": {"k_proj": 3, "layers.0.mlp.gate_proj": 20},
    },
    "untied output": {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head", "o_proj"]},
}


def save_base(folder: Path, model: PreTrainedModel, shard: str = "30KB") -> Path:
    with quiet():
        model.save_pretrained(folder, max_shard_size=shard)
        GenerationConfig(max_new_tokens=7, eos_token_id=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, dtype: torch.dtype = torch.float32, seed: int = 1, **lora: Any) -> Path:
    """A random adapter on the extended base, stored as training stores it."""
    source = resolve_source(str(base))
    config = extend_config(load_config(source), method="yarn", target_length=TARGET_LENGTH)
    torch.manual_seed(seed)
    arguments = {"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM", "init_lora_weights": False, **lora}
    with quiet():
        model = get_peft_model(load_model(source, config, dtype=dtype, device=CPU), LoraConfig(**arguments))
    provenance = {
        "base": {"source": str(base), "revision": None, "fingerprint": weights_fingerprint(source, config)},
        "method": {"method": "yarn"},
        "original_length": ORIGINAL_LENGTH,
        "target_length": TARGET_LENGTH,
    }
    save_adapter(folder, model, provenance)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A bfloat16 model in several files."""
    return save_base(tmp_path / "base", tiny_model().bfloat16())


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def merged_by_peft(adapter: Path, base: Path) -> dict[str, Tensor]:
    """Base and adapter in float32, merged by peft."""
    model = load_model(resolve_source(str(base)), adapter_config(adapter), dtype=torch.float32, device=CPU)
    merged: Any = load_adapter(adapter, model).merge_and_unload()
    return dict(merged.state_dict())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    weights = checkpoint_tensors(folder)
    return {name: weights.read(name) for name in weights.tensors}


@pytest.mark.parametrize(
    ("lora", "dtype"),
    [*((lora, torch.float32) for lora in ADAPTERS), ("patterns", torch.bfloat16), ("patterns", torch.float16)],
)
def test_every_tensor_is_what_peft_merges_rounded_once(
    tmp_path: Path, lora: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 32 * 9)  # rows in blocks that divide nothing evenly
    base = save_base(tmp_path / "base", tiny_model().to(dtype))
    adapter = make_adapter(tmp_path / "adapter", base, **ADAPTERS[lora])
    shown = merge_streamed(adapter, base, tmp_path / "out", proof="samples")
    expected, stored, before = merged_by_peft(adapter, base), tensors_of(tmp_path / "out"), tensors_of(base)
    assert stored.keys() == before.keys()
    changed = 0
    for name, tensor in stored.items():
        assert tensor.dtype == dtype
        if torch.equal(tensor, before[name]):
            assert torch.equal(tensor.float(), expected[name])
            continue
        changed += 1
        # Half a unit in the last place, and what float32 sums in another order may differ by.
        unit = expected[name].abs() * torch.finfo(dtype).eps / 2 * (dtype != torch.float32)
        assert bool(((tensor.float() - expected[name]).abs() <= unit + 1e-6).all()), name
    assert changed == shown.num_merged_tensors == (3 if lora == "untied output" else 14)
    assert shown.num_other_tensors == len(stored) - changed


def test_the_folder_is_the_one_that_a_merge_in_memory_writes(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_adapter(adapter, tmp_path / "streamed")
    source = resolve_source(str(base))
    model = load_adapter(adapter, load_model(source, adapter_config(adapter), dtype=torch.bfloat16, device=CPU))
    write_merged(tmp_path / "memory", model, load_tokenizer(source), read_provenance(adapter))
    mine, theirs = (
        {path.name: path for path in (tmp_path / folder).iterdir() if "safetensors" not in path.name}
        for folder in ("streamed", "memory")
    )
    assert mine.keys() == theirs.keys()
    assert {"config.json", "generation_config.json", "tokenizer.json", "ctxext.json", "manifest.json"} <= mine.keys()
    compared = 0
    for name in mine.keys() - {"manifest.json"}:
        assert read_json(mine[name]) == read_json(theirs[name]), name
        compared += 1
    assert compared >= 5
    for folder in ("streamed", "memory"):
        manifest = verify_manifest(tmp_path / folder)
        assert manifest["kind"] == "merged"
        assert any(name.endswith(".safetensors") for name in manifest["files"])
    assert read_json(mine["config.json"])["dtype"] == "bfloat16"
    assert read_json(mine["generation_config.json"])["max_new_tokens"] == 7
    assert read_json(mine["tokenizer_config.json"])["model_max_length"] == TARGET_LENGTH


def test_logits_prove_the_merge_where_the_model_fits_and_samples_where_it_does_not(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = merge_adapter(adapter, tmp_path / "fits")
    assert shown.largest_logit_difference is not None
    assert shown.largest_logit_difference > 0
    assert (shown.num_merged_tensors, shown.verification.target_length) == (14, TARGET_LENGTH)
    assert shown.verification.attention_factor > 1
    lines = shown.summary()
    assert lines[0].startswith("merged file by file; weight files: ")
    assert "all 14 merged tensors" in lines[1]
    assert "largest logit difference to base + adapter" in lines[2]
    monkeypatch.setattr(proof, "available_memory", lambda: checkpoint_tensors(base).num_parameters * 4)
    sampled = merge_adapter(adapter, tmp_path / "does not")
    assert sampled.largest_logit_difference is None
    assert sampled.verification == shown.verification
    assert "no logits compared" in sampled.summary()[2]
    assert all(
        torch.equal(tensor, tensors_of(tmp_path / "fits")[name])
        for name, tensor in tensors_of(tmp_path / "does not").items()
    )


def double(target: proof.LoraTarget) -> Any:
    return merge_edit(replace(target, scaling=target.scaling * 2))


def forget(target: proof.LoraTarget) -> Any:
    return lambda tensor: tensor


def swap_rows(target: proof.LoraTarget) -> Any:
    return lambda tensor: merge_edit(target)(tensor).flip(0)


merge_edit = merge._edit


@pytest.mark.parametrize("fault", [double, forget, swap_rows])
@pytest.mark.parametrize("way", ["logits", "samples"])
def test_either_proof_alone_refuses_a_wrong_merge(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, way: Any
) -> None:
    monkeypatch.setattr(merge, "_edit", fault)
    if way == "logits":
        monkeypatch.setattr(proof, "_check_rows", lambda *arguments: None)
    message = r"not give the logits of base \+ adapter" if way == "logits" else r"is not base \+ adapter"
    with pytest.raises(ArtefactError, match=message):
        merge_streamed(adapter, base, tmp_path / "out", proof=way)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_positions_that_the_written_config_lacks_are_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = merge._write_config

    def without_scaling_alone(folder: Path) -> None:
        config = read_json(folder / "config.json")
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
        config |= {"rope_theta": 10000.0, "rope_scaling": None}
        write_json_atomic(folder / "config.json", config)

    def without_scaling(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        without_scaling_alone(folder)

    monkeypatch.setattr(merge, "_write_config", without_scaling)
    with pytest.raises(PositionsNotInEffectError, match="positions are not in effect"):
        merge_streamed(adapter, base, tmp_path / "out", proof="samples")
    source = resolve_source(str(base))
    model = load_adapter(adapter, load_model(source, adapter_config(adapter), dtype=torch.bfloat16, device=CPU))
    monkeypatch.setattr(merge, "write_both_forms", without_scaling_alone)
    with pytest.raises(ArtefactError, match="does not give the logits"):
        write_merged(tmp_path / "out", model, load_tokenizer(source), read_provenance(adapter))


def test_samples_refuse_a_tensor_that_no_adapter_touches_but_that_differs(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = merge._write_config

    def and_damage(folder: Path, plan: Any, base_folder: Path) -> None:
        write(folder, plan, base_folder)
        weights = checkpoint_tensors(folder)
        path = folder / weights.file_of["model.norm.weight"]
        data = bytearray(path.read_bytes())
        data[weights.tensors["model.norm.weight"].start] ^= 1
        path.unlink()
        path.write_bytes(data)

    monkeypatch.setattr(merge, "_write_config", and_damage)
    with pytest.raises(ArtefactError, match=r"model\.norm\.weight: a tensor that no adapter touches differs"):
        merge_streamed(adapter, base, tmp_path / "out", proof="samples")


def test_files_without_merged_tensors_are_links_unless_copies_are_asked_for(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["layers.1.self_attn.q_proj"])
    for link in (True, False):
        destination = tmp_path / f"link {link}"
        merge_streamed(adapter, base, destination, link=link)
        shared = [path.name for path in base.glob("*.safetensors") if path.samefile(destination / path.name)]
        assert len(shared) == (len(list(base.glob("*.safetensors"))) - 1 if link else 0)


def test_dtypes_other_than_the_stored_one_are_merged_in_memory(base: Path, adapter: Path, tmp_path: Path) -> None:
    shown = merge_adapter(adapter, tmp_path / "float32", "float32")
    assert "in memory, not streamed: the base is stored in another dtype" in shown.way
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "float32").values()} == {torch.float32}
    assert merge_adapter(adapter, tmp_path / "bfloat16", "bfloat16").way.startswith("merged file by file")


def tied(folder: Path) -> Path:
    return save_base(folder, tiny_model(tie_word_embeddings=True))


def mixture(folder: Path) -> Path:
    config = MixtralConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        max_position_embeddings=ORIGINAL_LENGTH,
    )
    return save_base(folder, MixtralForCausalLM(config))


def without_prefix(folder: Path) -> Path:
    """Names as the bare decoder saves them, which transformers completes on loading."""
    save_base(folder, tiny_model(tie_word_embeddings=True), "1GB")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain(folder: Path) -> Path:
    return save_base(folder, tiny_model())


@pytest.mark.parametrize(
    ("make", "lora", "reason"),
    [
        (plain, {"use_dora": True}, "more than plain LoRA on linear layers"),
        (plain, {"modules_to_save": ["norm"]}, None),
        (plain, {"bias": "all", "target_modules": ["q_proj"], "lora_bias": False}, None),
        (plain, {"target_modules": ["embed_tokens", "q_proj"]}, "more than plain LoRA .*embedding"),
        (plain, {"lora_bias": True}, "more than plain LoRA .*bias"),
        (tied, {"target_modules": ["lm_head"]}, "lm_head.weight"),
        (without_prefix, {}, "transformers loads model.layers.0.* from tensors of other names"),
        (mixture, {"target_parameters": ["mlp.experts.gate_up_proj"]}, "more than plain LoRA"),
        (mixture, {"target_modules": ["q_proj"]}, None),
    ],
    ids=[
        "DoRA",
        "saved modules",
        "biases that are not there",
        "embedding",
        "LoRA bias",
        "tied",
        "no prefix",
        "experts",
        "beside",
    ],
)
def test_only_plain_lora_on_tensors_of_the_same_name_is_streamed(
    tmp_path: Path, make: Callable[[Path], Path], lora: dict[str, Any], reason: str | None
) -> None:
    base = make(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    if reason is None:
        merge_streamed(adapter, base, tmp_path / "out")
    else:
        with pytest.raises(NotStreamableError, match=reason):
            merge_streamed(adapter, base, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "lora", "reason"),
    [
        (plain, {"use_dora": True}, "the adapter is more than plain LoRA"),
        (without_prefix, {}, "transformers loads model"),
    ],
)
def test_what_cannot_be_streamed_is_merged_in_memory_and_says_why(
    tmp_path: Path, make: Callable[[Path], Path], lora: dict[str, Any], reason: str
) -> None:
    base = make(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    shown = merge_adapter(adapter, tmp_path / "out")
    assert shown.summary()[0].startswith(f"merged in memory, not streamed: {reason}")
    expected = merged_by_peft(adapter, base)
    assert all(torch.allclose(tensor, expected[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def test_a_model_of_the_hub_is_merged_from_its_snapshot(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert merge.safetensors_folder(resolve_source("someone/tiny")) == snapshot
    with pytest.raises(ArtefactError, match="someone/other: could not fetch the model's weights"):
        merge.safetensors_folder(resolve_source("someone/other"))
    provenance = read_provenance(adapter)
    provenance["base"] |= {"source": str(snapshot), "fingerprint": None}
    write_json_atomic(adapter / "ctxext.json", provenance)
    merge.write_manifest(adapter)
    merge_streamed(adapter, snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    with quiet():
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_another_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", tiny_model(seed=5).bfloat16())
    with pytest.raises(ArtefactError, match="weights are not the ones that were trained on"):
        merge_streamed(adapter, other, tmp_path / "out")
    twin = Path(shutil.copytree(base, tmp_path / "twin"))
    merge_streamed(adapter, twin, tmp_path / "out")
    provenance = read_provenance(adapter)
    del provenance["base"]["fingerprint"]  # as an adapter from elsewhere: the shapes still tell
    write_json_atomic(adapter / "ctxext.json", provenance)
    merge.write_manifest(adapter)
    wider = save_base(tmp_path / "wider", tiny_model(intermediate_size=96).bfloat16())
    with pytest.raises(ArtefactError, match=r"gate_proj\.weight.* another shape .*\(96, 32\).*expected \(64, 32\)"):
        merge_streamed(adapter, wider, tmp_path / "out2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.popitem(), "1 weights missing, 0 unknown"),
        (lambda tensors: tensors.update(stray=torch.zeros(1)), "0 weights missing, 1 unknown"),
        (lambda tensors: tensors.update({k: t[:2].clone() for k, t in list(tensors.items())[:1]}), "another shape"),
        (lambda tensors: tensors.update({k: t / 0 for k, t in tensors.items()}), "not finite numbers"),
    ],
    ids=["missing", "unknown", "shape", "NaN"],
)
def test_a_wrong_adapter_is_refused_under_an_agreeing_manifest(
    base: Path, adapter: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    merge.write_manifest(adapter)
    with pytest.raises(ArtefactError, match=message):
        merge_adapter(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_truncated_base_is_one_clear_error(base: Path, adapter: Path, tmp_path: Path) -> None:
    path = sorted(base.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-2])
    provenance = read_provenance(adapter)
    del provenance["base"]["fingerprint"]
    write_json_atomic(adapter / "ctxext.json", provenance)
    merge.write_manifest(adapter)
    with pytest.raises(ArtefactError, match=f"{path.name}: could not read the tensors: the file is cut short"):
        merge_adapter(adapter, tmp_path / "out")


def test_a_disk_that_fills_up_at_any_file_leaves_no_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in base.glob("*.safetensors"))
    tokenizer = (base / "tokenizer.json").stat().st_size
    config = (base / "config.json").stat().st_size
    assert config < tokenizer
    limits = (200, config, tokenizer - 1, largest - 1)
    for limit in limits:
        with file_size_limit(limit), pytest.raises(ResourceError, match="could not write"):
            merge_streamed(adapter, base, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    with file_size_limit(200), pytest.raises(ResourceError, match="could not write the tokenizer"):
        merge._write_companions(tmp_path, byte_tokenizer(), {"target_length": 256})
    merge_streamed(adapter, base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["kind"] == "merged"
