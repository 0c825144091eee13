"""A base in 4 bits: computes with what its bits mean, trains adapters exactly, keeps its positions; or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rope.tiny_families import build, tiny_family_config
from support import TARGET_LENGTH, make_job, needs_bitsandbytes, save_tiny_model, tiny_model
from torch import Tensor, nn

from ctxext.errors import CtxextError, ResourceError, UnsupportedModelError
from ctxext.export.gguf import export_gguf
from ctxext.model.adaptation import adapt
from ctxext.model.load import load_config, load_model, quiet, resolve_source
from ctxext.model.quantised import (
    check_bitsandbytes,
    layers_in_4_bits,
    load_quantised,
    num_parameters,
    quantisation_note,
)
from ctxext.planning.plan import make_plan
from ctxext.recipe.schema import LoraBlock
from ctxext.rope.patchers import extend_config
from ctxext.rope.verify import verify_positions
from ctxext.train.step import SummedLoss

CPU = torch.device("cpu")
IDS = (torch.arange(64)[None] * 37 + 5) % 256
# Large enough for the whole moments of a block, and not a multiple of anything in the vocabulary.
SHAPE = {"hidden_size": 64, "intermediate_size": 160}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("quantised") / "model", **SHAPE)


def quantised(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    source = resolve_source(str(folder))
    config = extend_config(load_config(source), method="yarn", target_length=TARGET_LENGTH)
    model = load_quantised(source, config, dtype=dtype, device=CPU)
    verify_positions(model, config)
    return model


def with_the_same_numbers(model: Any, folder: Path) -> Any:
    """A plain model whose weights are what the 4-bit ones mean."""
    from bitsandbytes.functional import dequantize_4bit

    source = resolve_source(str(folder))
    config = extend_config(load_config(source), method="yarn", target_length=TARGET_LENGTH)
    plain = load_model(source, config, dtype=torch.float32, device=CPU)
    for name in layers_in_4_bits(plain):
        weight = model.get_submodule(name).weight
        plain.get_submodule(name).weight.data = dequantize_4bit(weight.data, weight.quant_state).float()
    return plain


def loss_and_gradients(base: Any) -> dict[str, Tensor]:
    adapted: Any = adapt(base, "qlora", LoraBlock(rank=4, embeddings_and_norms=True), seed=3).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    loss = SummedLoss(adapted)(IDS, torch.arange(IDS.shape[1])[None])
    loss.backward()
    found = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **found}


@needs_bitsandbytes
def test_loss_and_gradients_are_those_of_the_weights_that_the_bits_mean(folder: Path) -> None:
    model = quantised(folder)
    reference = loss_and_gradients(with_the_same_numbers(model, folder))
    actual = loss_and_gradients(model)
    assert actual.keys() == reference.keys()
    assert len(actual) == 1 + 2 * 14 + 2 + 5
    for name, value in actual.items():
        assert torch.allclose(value, reference[name], rtol=1e-4, atol=1e-5), name


@needs_bitsandbytes
def test_an_evaluation_in_between_changes_neither_weights_nor_gradients(folder: Path) -> None:
    expected = loss_and_gradients(quantised(folder))
    model = quantised(folder)
    with torch.inference_mode():
        model.eval()(IDS)
    actual = loss_and_gradients(model)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_lie_in_4_bits_and_everything_else_in_the_models_dtype(folder: Path, dtype: torch.dtype) -> None:
    model, plain = quantised(folder, dtype), tiny_model(**SHAPE)
    names = layers_in_4_bits(plain)
    assert len(names) == 14
    for name, module in plain.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            mine = model.get_submodule(name).get_parameter(own)
            assert mine.dtype == dtype  # the bytes as well, which FSDP2 needs
            if name in names:
                assert mine.numel() * mine.element_size() == parameter.numel() // 2
                assert mine.quant_state.quant_type == "nf4"
                assert mine.quant_state.nested
            else:
                assert mine.shape == parameter.shape
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert num_parameters(model) == num_parameters(plain) == sum(p.numel() for p in plain.parameters())


@needs_bitsandbytes
def test_how_weights_lie_in_memory_stays_out_of_the_config(folder: Path) -> None:
    assert "quantization_config" not in quantised(folder).config.to_dict()


@needs_bitsandbytes
def test_a_gguf_file_is_dequantised_first(folder: Path, tmp_path: Path) -> None:
    export_gguf(folder, tmp_path / "model.gguf", dtype="float32")
    one, two = quantised(folder), quantised(tmp_path / "model.gguf")
    for name in layers_in_4_bits(tiny_model(**SHAPE)):
        mine, theirs = (model.get_submodule(name).weight.data.view(torch.uint8) for model in (one, two))
        assert torch.equal(mine, theirs), name  # as bytes, some of which mean NaN as numbers
    assert not hasattr(two.config, "quantization_config")


def test_neither_output_embedding_nor_routers_lie_in_4_bits() -> None:
    with quiet():
        model = build(tiny_family_config("qwen2_moe"))
    names = layers_in_4_bits(model)
    assert names
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    left = set(linear) - set(names)
    assert "lm_head" in left
    assert sum(name.endswith("shared_expert_gate") for name in left) == model.config.num_hidden_layers
    assert all(name == "lm_head" or "gate" in name.rpartition(".")[2] for name in left)


def test_a_model_of_stacked_experts_is_said_to_gain_little() -> None:
    with quiet():
        mixture = build(tiny_family_config("mixtral", num_local_experts=8))
    assert "little memory is saved" in quantisation_note(mixture)
    note = quantisation_note(tiny_model(hidden_size=128, intermediate_size=512))
    assert "14 linear layers" in note
    assert "little" not in note


def test_the_plan_says_how_much_lies_in_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    job = make_job(tmp_path)
    assert any("in 4 bits (nf4): 14 linear layers" in note for note in make_plan(job.recipe("adaptation=qlora")).notes)
    assert not any("4 bits" in note for note in make_plan(job.recipe()).notes)


def test_it_is_refused_before_any_work_without_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_job(tmp_path).recipe("adaptation=qlora")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"adaptation: .*not installed.*ctxext\[qlora\].*adaptation=lora"):
        make_plan(recipe)


def test_it_is_refused_on_apples_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ResourceError, match="Apple"):
        check_bitsandbytes(make_job(tmp_path).recipe("adaptation=qlora"), tiny_model().config, "mps")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_a_base_that_is_quantised_already_is_refused_by_its_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    job = make_job(tmp_path)
    path = tmp_path / "models" / "tiny" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}))
    with pytest.raises(CtxextError) as caught:
        make_plan(job.recipe("adaptation=qlora"))
    assert isinstance(caught.value, UnsupportedModelError)
    assert method in str(caught.value)
