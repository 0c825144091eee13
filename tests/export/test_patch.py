"""A patched checkpoint is the model that the other two patchers give, and nothing else of its source has changed."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rope.tiny_families import build, run, tiny_family_config
from support import EOS, SilentReporter, byte_tokenizer, make_job, save_tiny_model, tiny_model
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from ctxext.errors import ArtefactError, UnsupportedModelError, UsageError
from ctxext.export.gguf import export_gguf
from ctxext.export.merge import merge_adapter
from ctxext.export.patch import PatchReport, patch_checkpoint
from ctxext.files import sha256_file, verify_manifest
from ctxext.model.load import load_config, load_model, quiet, resolve_source
from ctxext.pipeline.extend import extend
from ctxext.rope.families import text_config
from ctxext.rope.live import patch_model
from ctxext.rope.patchers import extend_config
from ctxext.rope.portable import is_portable
from ctxext.train.adapter import adapter_config, load_adapter

TARGET = 512
FAR = 400
FOLDED = 1e-4  # folding multiplies in another order
_RATIOS = [1.0, 0.9, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "ntk": ("ntk", {}),
    "theta": ("theta", {}),
    "dynamic": ("dynamic", {}),
    "yarn": ("yarn", {"beta_fast": 16.0}),
    "yarn, own attention factor": ("yarn", {"attention_factor": 1.3}),
    "ntk-by-parts": ("ntk-by-parts", {}),
    "llama3": ("llama3", {}),
    "longrope, one range": ("longrope", {"long_factor": [1.0 / ratio for ratio in _RATIOS]}),
    "longrope, two ranges": ("longrope", {"long_factor": [1.0 / r for r in _RATIOS], "short_factor": [1.1] * 8}),
    "cope": ("cope", {"dimensions": 5}),
    "resonance": ("resonance", {}),
    "frequency-map": ("frequency-map", {"ratios": _RATIOS, "attention_factor": 1.2}),
    "none": ("none", {"control": True}),
}
# Whose attention factor goes into the weights, because no reader is known to compute it right otherwise.
FOLDS = ("yarn, own attention factor", "longrope, one range", "resonance", "frequency-map")
FAMILIES = "gemma3_text gemma3 olmo3 gpt_neox qwen2 qwen3 stablelm phi3 mixtral deepseek_v3".split()


def family_config(family: str) -> PreTrainedConfig:
    if family != "gemma3":
        return tiny_family_config(family)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = tiny_family_config("gemma3_text").to_dict()
    return Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4, image_token_index=3)


def write_family(folder: Path, family: str) -> PreTrainedModel:
    """A random model, norms and biases included, with a tokenizer, in `folder`."""
    model = build(family_config(family))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with quiet():
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def loaded_with(source: Path, config: PreTrainedConfig) -> PreTrainedModel:
    cpu = torch.device("cpu")
    return load_model(resolve_source(str(source)), config, dtype=torch.float32, device=cpu, attention="eager")


def far(model: Any) -> Tensor:
    return run(model, offset=FAR)


def largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


def rope_of(folder: Path) -> dict[str, Any]:
    parameters: dict[str, Any] = text_config(load_config(resolve_source(str(folder)))).rope_parameters
    return parameters


def three_patchers(source: Path, destination: Path, model: Any, **asked: Any) -> tuple[PatchReport, list[Tensor]]:
    """Logits far beyond the original length: patched on disk, patched in memory, loaded with the extended config."""
    report = patch_checkpoint(str(source), destination, **asked)
    live = copy.deepcopy(model)
    patch_model(live, **asked)
    extended = extend_config(load_config(resolve_source(str(source))), **asked)
    return report, [far(stock(destination)), far(live), far(loaded_with(source, extended))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llama") / "base"
    return folder, write_family(folder, "llama")


@pytest.mark.parametrize("name", METHODS)
def test_the_three_patchers_agree_for_every_method(
    llama: tuple[Path, PreTrainedModel], tmp_path: Path, name: str
) -> None:
    source, model = llama
    method, parameters = METHODS[name]
    before = contents(source)
    report, (on_disk, live, loaded) = three_patchers(
        source, tmp_path / "out", model, method=method, target_length=TARGET, **parameters
    )
    assert torch.equal(live, loaded)
    assert largest_difference(on_disk, loaded) <= (FOLDED if name in FOLDS else 0.0)
    assert bool(report.folded) == (name in FOLDS)
    if name != "none":
        assert largest_difference(on_disk, far(model)) > 10 * FOLDED
    assert contents(source) == before
    assert verify_manifest(tmp_path / "out")["kind"] == "patched"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_three_patchers_agree_on_families_of_every_kind(family: str, tmp_path: Path) -> None:
    model = write_family(tmp_path / "base", family)
    asked = {"on_existing": "replace", "target_length": TARGET}
    for method in ("yarn", "linear", "ntk-by-parts", "resonance"):
        if family == "deepseek_v3" and method == "resonance":
            continue  # refused: its attention has a temperature of its own
        report, (on_disk, live, loaded) = three_patchers(
            tmp_path / "base", tmp_path / method, model, method=method, **asked
        )
        folded = method == "resonance" or (family == "phi3" and method == "yarn")
        assert bool(report.folded) == folded
        assert torch.equal(live, loaded)
        assert largest_difference(on_disk, loaded) <= (FOLDED if folded else 0.0), (family, method)
        assert largest_difference(on_disk, far(model)) > 10 * FOLDED, (family, method)


def test_weights_are_linked_when_nothing_changes_and_never_loaded(
    llama: tuple[Path, PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = llama

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("the weights were loaded")

    with monkeypatch.context() as guard:
        guard.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
        guard.setattr("ctxext.export.patch.load_model", refuse)
        guard.setattr("safetensors.torch.load_file", refuse)
        linked = patch_checkpoint(str(source), tmp_path / "linked", target_length=TARGET)
        copied = patch_checkpoint(str(source), tmp_path / "copied", target_length=TARGET, link=False)
        folded = patch_checkpoint(str(source), tmp_path / "folded", target_length=TARGET, portable=True)
    weights = source / "model.safetensors"
    assert (tmp_path / "linked" / weights.name).samefile(weights)
    assert "1 hard-linked; 0 of" in linked.weights
    assert not (tmp_path / "copied" / weights.name).samefile(weights)
    assert sha256_file(tmp_path / "copied" / weights.name) == sha256_file(weights)
    assert "1 copied" in copied.weights
    assert not (tmp_path / "folded" / weights.name).samefile(weights)
    assert "1 rewritten; 4 of 21 tensors edited" in folded.weights
    assert folded.folded == {None: pytest.approx(1.1386294)}
    assert largest_difference(far(stock(tmp_path / "linked")), far(stock(tmp_path / "folded"))) <= FOLDED


def test_the_portable_form_is_what_every_reader_computes_right_and_is_refused_where_there_is_none(
    llama: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    source, _ = llama
    assert patch_checkpoint(str(source), tmp_path / "portable", target_length=TARGET, portable=True).portable
    written = json.loads((tmp_path / "portable" / "config.json").read_text())
    assert is_portable(written["rope_parameters"])
    for form in (written["rope_parameters"], written["rope_scaling"]):
        assert form["factor"] == 1.0
        assert form["original_max_position_embeddings"] == written["max_position_embeddings"] == TARGET
        assert "attention_factor" not in form
    report = patch_checkpoint(str(source), tmp_path / "stock", method="resonance", target_length=TARGET, portable=False)
    assert (report.portable, report.folded) == (False, {})
    assert rope_of(tmp_path / "stock")["attention_factor"] == pytest.approx(1.1386294)
    two_ranges = {"method": "longrope", **METHODS["longrope, two ranges"][1]}
    for asked in ({"method": "dynamic"}, two_ranges):
        with pytest.raises(UnsupportedModelError, match="no portable form"):
            patch_checkpoint(str(source), tmp_path / "refused", target_length=TARGET, portable=True, **asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["portable", "stock"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_checkpoints_keep_shards_index_and_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model().to(dtype)
    with quiet():
        model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    shards = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards) >= 3
    for portable in (False, True):
        out = tmp_path / f"portable-{portable}"
        report = patch_checkpoint(str(tmp_path / "base"), out, target_length=TARGET, portable=portable)
        assert sorted(path.name for path in out.glob("*.safetensors")) == shards
        index = "model.safetensors.index.json"
        assert (out / index).read_bytes() == (tmp_path / "base" / index).read_bytes()
        num_linked = sum((out / name).samefile(tmp_path / "base" / name) for name in shards)
        assert (num_linked == len(shards)) != portable
        assert f"{num_linked} hard-linked" in report.weights
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        verify_manifest(out)
    native, folded = stock(tmp_path / "portable-False"), stock(tmp_path / "portable-True")
    expected = loaded_with(
        tmp_path / "base", extend_config(load_config(resolve_source(str(tmp_path / "base"))), target_length=TARGET)
    )
    assert torch.equal(far(native), far(expected))
    # bfloat16 rounds the folded query and key once more, to 3 digits.
    assert largest_difference(far(folded), far(native)) <= (FOLDED if dtype == torch.float32 else 0.05)
    assert largest_difference(far(loaded_with(tmp_path / "base", tiny_model().config)), far(native)) > 0.1


def test_what_belongs_to_a_model_is_kept_and_the_tokenizers_limit_is_raised(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "base")
    generation = {"temperature": 0.6, "do_sample": True, "eos_token_id": 256, "transformers_version": "4.57.6"}
    (source / "generation_config.json").write_text(json.dumps(generation))
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"model_max_length": 128}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    kept = {"chat_template.jinja": "{{ messages }}", "LICENSE": "yours", "special_tokens_map.json": "{}"}
    for name, text in kept.items():
        (source / name).write_text(text)
    (source / "model.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    before = contents(source)
    out = tmp_path / "out"
    patch_checkpoint(str(source), out, target_length=TARGET)
    for name, text in kept.items():
        assert (out / name).read_text() == text
    assert json.loads((out / "generation_config.json").read_text()) == generation
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text()) == settings | {"model_max_length": TARGET}
    assert AutoTokenizer.from_pretrained(out).model_max_length == TARGET
    assert not {"model.py", "pytorch_model.bin"} & {path.name for path in out.iterdir()}
    assert contents(source) == before
    manifest = verify_manifest(out)
    assert set(manifest["files"]) == {path.name for path in out.iterdir()} - {"manifest.json"}


def test_ctxext_json_says_where_it_came_from_and_what_was_done(
    llama: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    source, _ = llama
    patch_checkpoint(str(source), tmp_path / "out", target_length=TARGET, portable=True, beta_fast=16.0)
    provenance = json.loads((tmp_path / "out" / "ctxext.json").read_text())
    assert len(provenance["base"].pop("fingerprint")) == 16
    assert provenance == {
        "base": {"source": str(source), "revision": None},
        "method": {
            "method": "yarn",
            "factor": 4.0,
            "beta_fast": 16.0,
            "beta_slow": 1.0,
            "attention_factor": None,
            "truncate": True,
        },
        "on_existing": "refuse",
        "original_length": 128,
        "target_length": TARGET,
        "trained": False,
        "portable": True,
    }


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with one merge: transformers reads no GGUF tokenizer without any."""
    tokenizer = byte_tokenizer().backend_tokenizer
    data = json.loads(tokenizer.to_str())
    data["model"]["vocab"]["th"] = 257
    data["model"]["merges"] = [["t", "h"]]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token=EOS)


def test_a_gguf_file_is_patched_too(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "base")
    merging_tokenizer().save_pretrained(source)
    export_gguf(source, tmp_path / "base.gguf", dtype="float32")
    for name, asked in (("yarn", {"method": "yarn"}), ("folded", {"method": "resonance"})):
        report = patch_checkpoint(str(tmp_path / "base.gguf"), tmp_path / name, target_length=TARGET, **asked)
        assert "from GGUF" in report.weights
        expected = loaded_with(
            source, extend_config(load_config(resolve_source(str(source))), target_length=TARGET, **asked)
        )
        assert largest_difference(far(stock(tmp_path / name)), far(expected)) <= FOLDED
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "quantization_config" not in config
        assert str(tmp_path) not in json.dumps(config)
        assert AutoTokenizer.from_pretrained(tmp_path / name).model_max_length == TARGET
        verify_manifest(tmp_path / name)


@pytest.fixture(scope="module")
def extended_once(llama: tuple[Path, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base extended to 256 by YaRN, in the stock and in the portable form."""
    folder = tmp_path_factory.mktemp("once")
    patch_checkpoint(str(llama[0]), folder / "stock", target_length=256)
    patch_checkpoint(str(llama[0]), folder / "portable", target_length=256, portable=True)
    return folder


def test_an_extended_checkpoint_is_extended_again_only_by_choice(extended_once: Path, tmp_path: Path) -> None:
    for form in ("stock", "portable"):
        with pytest.raises(UnsupportedModelError, match="already scaled"):
            patch_checkpoint(str(extended_once / form), tmp_path / "out", target_length=TARGET)
    # A portable checkpoint cannot show its original length, so there is nothing to go back to.
    with pytest.raises(UnsupportedModelError):
        patch_checkpoint(str(extended_once / "portable"), tmp_path / "out", target_length=TARGET, on_existing="replace")
    assert not list(tmp_path.iterdir())


def test_replacing_a_scaling_gives_what_extending_the_base_gives(
    llama: tuple[Path, PreTrainedModel], extended_once: Path, tmp_path: Path
) -> None:
    report = patch_checkpoint(
        str(extended_once / "stock"), tmp_path / "out", target_length=TARGET, on_existing="replace"
    )
    assert report.original_length == 128
    expected = loaded_with(llama[0], extend_config(llama[1].config, target_length=TARGET))
    assert torch.equal(far(stock(tmp_path / "out")), far(expected))


def test_composing_is_exact_from_either_form(
    llama: tuple[Path, PreTrainedModel], extended_once: Path, tmp_path: Path
) -> None:
    twice = extend_config(
        extend_config(llama[1].config, target_length=256), target_length=TARGET, on_existing="compose"
    )
    expected = far(loaded_with(llama[0], twice))
    for form in ("stock", "portable"):
        report = patch_checkpoint(
            str(extended_once / form), tmp_path / form, target_length=TARGET, on_existing="compose"
        )
        assert (report.original_length, report.portable) == (256, True)
        assert largest_difference(far(stock(tmp_path / form)), expected) <= FOLDED
    once = loaded_with(llama[0], extend_config(llama[1].config, target_length=TARGET))
    assert largest_difference(far(once), expected) > 10 * FOLDED


def test_an_adapter_trained_with_a_map_merges_into_a_portable_checkpoint(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    extend(job.recipe("rope.method=resonance", "train.steps=2"), SilentReporter(), last_stage="train")
    adapter, merged = job.output / "adapter", tmp_path / "merged"
    merge_adapter(adapter, merged, "float32")
    config = adapter_config(adapter)
    assert text_config(config).rope_parameters["attention_factor"] > 1.05
    base = load_model(
        resolve_source(str(tmp_path / "models" / "tiny")), config, dtype=torch.float32, device=torch.device("cpu")
    )
    without_adapter = run(base, offset=200)
    expected = run(load_adapter(adapter, base).eval(), offset=200)  # type: ignore[arg-type]
    assert is_portable(rope_of(merged))
    assert largest_difference(run(stock(merged), offset=200), expected) <= FOLDED
    assert largest_difference(without_adapter, expected) > 10 * FOLDED
    verify_manifest(merged)


def test_a_source_that_needs_code_or_pickles_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "base")
    os.rename(source / "model.safetensors", source / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match="not stored as safetensors"):
        patch_checkpoint(str(source), tmp_path / "out", target_length=TARGET)
    code = save_tiny_model(tmp_path / "code")
    config = json.loads((code / "config.json").read_text())
    own = {"AutoConfig": "model.Mine", "AutoModelForCausalLM": "model.Mine"}
    (code / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": own}))
    (code / "model.py").write_text("raise SystemExit('the repository code ran')")
    with pytest.raises(UnsupportedModelError, match="its own Python code"):
        patch_checkpoint(str(code), tmp_path / "out", target_length=TARGET)
    with pytest.raises(UsageError, match="must be above"):
        patch_checkpoint(str(source), tmp_path / "out", target_length=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "code"]
