"""`patch_model` gives what loading with the extended config gives, on any family, and `unpatch` takes it all back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import tiny_model
from tiny_families import build, run, tiny_family_config

import ctxext
from ctxext.errors import UnsupportedModelError, UsageError
from ctxext.rope.live import patch_model, unpatch
from ctxext.rope.patchers import extend_config

TARGET = 512
FAR = 400
# One of each kind: flat, per layer type, partial rotary, fused projection, mixture of experts, only maps, latent
# attention with a softmax scale of its own, multimodal positions, complex rotation.
FAMILIES = (
    "llama gemma3_text olmo3 gpt_neox stablelm mixtral phi3 phimoe deepseek_v2 deepseek_v3 qwen3_5_text cohere"
).split()
METHODS: dict[str, dict[str, Any]] = {
    "yarn": {},
    "linear": {},
    "ntk": {},
    "llama3": {},
    "ntk-by-parts": {},
    "none": {"control": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_is_what_loading_with_the_extended_config_gives(family: str) -> None:
    config = tiny_family_config(family)
    live = build(config)
    before, weights = run(live, offset=FAR), copy.deepcopy(live.state_dict())
    for method, parameters in METHODS.items():
        extended = extend_config(config, method=method, target_length=TARGET, **parameters)
        expected = build(extended)
        expected.load_state_dict(weights)
        verification = patch_model(live, method=method, target_length=TARGET, **parameters)
        assert verification.target_length == TARGET
        assert torch.equal(run(live, offset=FAR), run(expected, offset=FAR))
        assert live.config.get_text_config().to_dict() == extended.get_text_config().to_dict()
        if method in ("yarn", "linear"):
            assert not torch.allclose(run(live, offset=FAR), before, atol=1e-3)
        unpatch(live)
        assert torch.equal(run(live, offset=FAR), before)
        assert live.config.get_text_config().to_dict() == config.to_dict()


def test_a_saved_patched_model_loads_extended(tmp_path: Any) -> None:
    model = tiny_model()
    ctxext.patch_model(model, target_length=TARGET)
    expected = run(model, offset=FAR)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path).eval(), offset=FAR), expected)


def test_a_peft_model_is_patched_inside_its_wrapper() -> None:
    base = tiny_model()
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = run(wrapped, offset=FAR)
    patch_model(wrapped, target_length=TARGET)
    assert not torch.allclose(run(wrapped, offset=FAR), before, atol=1e-3)
    unpatch(wrapped)
    assert torch.equal(run(wrapped, offset=FAR), before)


def test_training_mode_and_device_are_kept() -> None:
    model = tiny_model().train()
    patch_model(model, target_length=TARGET)
    assert all(module.training for module in model.modules())


def test_patching_twice_and_unpatching_nothing_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="not patched"):
        unpatch(model)
    patch_model(model, target_length=TARGET)
    with pytest.raises(UsageError, match="patched already"):
        patch_model(model, target_length=TARGET)
    with pytest.raises(UsageError, match="takes a transformers model"):
        patch_model(torch.nn.Linear(2, 2), target_length=TARGET)


def test_a_refused_patch_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    before, values = run(model, offset=FAR), model.config.to_dict()
    with pytest.raises(UsageError):
        patch_model(model, target_length=64)
    with pytest.raises(UnsupportedModelError):
        patch_model(build(tiny_family_config("gpt2")), target_length=TARGET)
    assert torch.equal(run(model, offset=FAR), before)
    assert model.config.to_dict() == values
    patch_model(model, target_length=TARGET)
