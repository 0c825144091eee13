"""An adapter made weaker or stronger, and added to a sibling of its base: right to rounding, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_merge_streamed import CPU, make_adapter, save_base, tensors_of
from support import TARGET_LENGTH, byte_tokenizer, tiny_model
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from ctxext.cli import app
from ctxext.errors import ArtefactError, UsageError
from ctxext.export import merge
from ctxext.export.merge import NotStreamableError, merge_adapter
from ctxext.export.placement import place_adapter
from ctxext.export.proof import probe_ids, probe_logits, read_back
from ctxext.files import read_json, write_json_atomic
from ctxext.model.load import load_model, load_tokenizer, resolve_source
from ctxext.pipeline.verify import verify_checkpoint
from ctxext.rope.patchers import extend_config
from ctxext.train.adapter import adapter_config, load_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", tiny_model())


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def perturbed(seed: int = 5, **changes: Any) -> PreTrainedModel:
    """What instruction tuning would have made of the base."""
    model = tiny_model(**changes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture
def sibling(tmp_path: Path) -> Path:
    return save_base(tmp_path / "sibling", perturbed())


@pytest.fixture(params=["streamed", "in memory"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of merging."""
    if request.param == "in memory":

        def refuse(*_: object) -> None:
            raise NotStreamableError("this test asks for it")

        monkeypatch.setattr(merge, "safetensors_folder", refuse)
    return str(request.param)


def deltas(adapter: Path, base: Path) -> dict[str, Tensor]:
    """What the adapter adds to each weight, computed by peft."""
    model = load_model(resolve_source(str(base)), adapter_config(adapter), dtype=torch.float32, device=CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged: Any = load_adapter(adapter, model).merge_and_unload()
    return {name: value - before[name] for name, value in merged.state_dict().items()}


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_scaled_merge_is_base_plus_that_much_of_the_change(
    base: Path, adapter: Path, tmp_path: Path, scale: float, way: str
) -> None:
    shown = merge_adapter(adapter, tmp_path / "out", "float32", scale=scale)
    assert shown.way.startswith("merged file by file") == (way == "streamed")
    merged, before, change = tensors_of(tmp_path / "out"), tensors_of(base), deltas(adapter, base)
    num_changed = 0
    for name, tensor in merged.items():
        assert torch.allclose(tensor, before[name] + scale * change[name], atol=2e-6), name
        num_changed += not torch.equal(tensor, before[name])
    assert num_changed == 14
    assert shown.largest_logit_difference is not None
    assert any(f"{scale:g} times as strong" in line for line in shown.summary())
    provenance = read_json(tmp_path / "out" / "ctxext.json")
    assert provenance["adapter_scale"] == scale
    assert provenance["base"] == read_json(adapter / "ctxext.json")["base"]
    assert any("positions in effect" in line for line in verify_checkpoint(tmp_path / "out"))


def test_scale_1_is_the_plain_merge_to_the_byte(adapter: Path, tmp_path: Path) -> None:
    merge_adapter(adapter, tmp_path / "plain")
    shown = merge_adapter(adapter, tmp_path / "one", scale=1.0)
    assert shown.warnings == ()
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(adapter: Path, tmp_path: Path, scale: float) -> None:
    with pytest.raises(UsageError, match="--scale"):
        merge_adapter(adapter, tmp_path / "out", scale=scale)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["scale", "onto"])
def test_a_weight_decomposed_adapter_is_neither_scaled_nor_moved(
    base: Path, sibling: Path, tmp_path: Path, option: str
) -> None:
    adapter = make_adapter(tmp_path / "dora", base, use_dora=True)
    arguments: dict[str, Any] = {"scale": {"scale": 0.5}, "onto": {"onto": str(sibling)}}[option]
    with pytest.raises(UsageError, match=rf"--{option}.*DoRA"):
        merge_adapter(adapter, tmp_path / "out", **arguments)
    merge_adapter(adapter, tmp_path / "out", "float32")


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_sibling_gets_the_change_and_the_positions(
    base: Path, sibling: Path, adapter: Path, tmp_path: Path, way: str, scale: float
) -> None:
    shown = merge_adapter(adapter, tmp_path / "out", "float32", onto=str(sibling), scale=scale)
    assert shown.way.startswith("merged file by file") == (way == "streamed")
    merged, before, change = tensors_of(tmp_path / "out"), tensors_of(sibling), deltas(adapter, base)
    for name, tensor in merged.items():
        assert torch.allclose(tensor, before[name] + scale * change[name], atol=2e-6), name
    assert any("positions in effect" in line for line in verify_checkpoint(tmp_path / "out"))
    warning = next(line for line in shown.summary() if line.startswith("warning") and "trained on" in line)
    assert "nothing was measured" in warning
    assert str(base) in warning
    assert str(sibling) in warning
    provenance = read_json(tmp_path / "out" / "ctxext.json")
    assert provenance["base"]["source"] == str(sibling)
    assert provenance["adapter_trained_on"] == read_json(adapter / "ctxext.json")["base"]
    assert provenance.get("adapter_scale", 1.0) == scale


def test_the_proof_compares_with_the_sibling_and_not_with_the_base(
    base: Path, sibling: Path, adapter: Path, tmp_path: Path
) -> None:
    merge_adapter(adapter, tmp_path / "out", "float32", onto=str(sibling))
    tokenizer = load_tokenizer(resolve_source(str(sibling)))
    actual = probe_logits(read_back(tmp_path / "out", torch.float32, CPU), probe_ids(tokenizer), TARGET_LENGTH)
    for folder, same in ((sibling, True), (base, False)):
        model = load_model(resolve_source(str(folder)), adapter_config(adapter), dtype=torch.float32, device=CPU)
        expected = probe_logits(load_adapter(adapter, model).eval(), probe_ids(tokenizer), TARGET_LENGTH)
        assert bool(torch.allclose(actual, expected, atol=1e-4)) == same


def test_a_bfloat16_sibling_in_several_files_is_merged_file_by_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    sibling = save_base(tmp_path / "half", perturbed().bfloat16())
    shown = merge_adapter(adapter, tmp_path / "out", onto=str(sibling))
    assert shown.way.startswith("merged file by file")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        r"RoPE theta +base 10000\.0, \S+ 500000\.0",
    ),
    "original length": ({"max_position_embeddings": 192}, r"RoPE original_length +base 128, \S+ 192"),
    "layers": ({"num_hidden_layers": 3}, r"num_hidden_layers +base 2, \S+ 3"),
    "width of the MLP": ({"intermediate_size": 48}, r"gate_proj\.weight +base \[64, 32\], \S+ \[48, 32\]"),
    "heads": ({"num_key_value_heads": 2}, r"num_key_value_heads +base 1, \S+ 2"),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act +base silu, \S+ gelu"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_no_sibling_is_refused_with_what_differs(adapter: Path, tmp_path: Path, name: str) -> None:
    changes, pattern = DIFFERENT[name]
    other = save_base(tmp_path / "other", perturbed(**changes))
    with pytest.raises(ArtefactError) as caught:
        merge_adapter(adapter, tmp_path / "out", onto=str(other))
    assert re.search(pattern, str(caught.value)), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_everything_that_differs_is_listed_at_once(adapter: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", perturbed(num_hidden_layers=3, max_position_embeddings=192))
    with pytest.raises(ArtefactError, match=r"(?s)num_hidden_layers.*original_length"):
        place_adapter(adapter, onto=str(other))


def test_another_architecture_is_refused_by_its_name(adapter: Path, tmp_path: Path) -> None:
    values = {**tiny_model().config.to_dict(), "model_type": "qwen2"}
    other = save_base(tmp_path / "other", Qwen2ForCausalLM(Qwen2Config(**values)))
    with pytest.raises(ArtefactError, match=r"model_type +base llama, \S+ qwen2"):
        place_adapter(adapter, onto=str(other))


def test_a_larger_vocabulary_is_the_siblings_own_and_said(adapter: Path, tmp_path: Path) -> None:
    sibling = save_base(tmp_path / "sibling", perturbed(vocab_size=264))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(sibling)
    shown = merge_adapter(adapter, tmp_path / "out", "float32", onto=str(sibling))
    assert any("0 of the base's 257 tokens" in line and "1 are new" in line for line in shown.summary())
    assert "<|user|>" in load_tokenizer(resolve_source(str(tmp_path / "out"))).get_vocab()
    assert tensors_of(tmp_path / "out")["lm_head.weight"].shape[0] == 264


def test_an_adapter_of_a_later_stage_stays_on_its_own_base(base: Path, sibling: Path, tmp_path: Path) -> None:
    write_json_atomic(base / "ctxext.json", {"base": {}, "target_length": 128, "plan_id": "x"})
    changed = make_adapter(tmp_path / "again", base)
    with pytest.raises(ArtefactError, match="only the last part of the training"):
        place_adapter(changed, onto=str(sibling))


def test_the_siblings_config_is_its_own_but_for_the_positions(adapter: Path, tmp_path: Path) -> None:
    sibling = save_base(tmp_path / "sibling", perturbed(rms_norm_eps=1e-5))
    config = place_adapter(adapter, onto=str(sibling)).config
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == adapter_config(adapter).rope_parameters
    extended = extend_config(tiny_model(rms_norm_eps=1e-5).config, method="yarn", target_length=TARGET_LENGTH)
    assert config.max_position_embeddings == extended.max_position_embeddings


def test_the_command_line_takes_both_options(adapter: Path, sibling: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    result = CliRunner().invoke(app, ["merge", str(adapter), out, "--scale", "0.5", "--onto", str(sibling)])
    assert result.exit_code == 0, result.output
    provenance = read_json(tmp_path / "out" / "ctxext.json")
    assert (provenance["adapter_scale"], provenance["base"]["source"]) == (0.5, str(sibling))
    assert "nothing was measured" in " ".join(result.output.split())
