"""The whole job on architectures that are not a flat Llama: train, merge, read back, verify."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from rope.tiny_families import build, tiny_family_config
from support import SilentReporter, byte_tokenizer, recipe_values, write_suite

from ctxext.files import read_json
from ctxext.model.load import quiet
from ctxext.pipeline.extend import extend
from ctxext.pipeline.recipes import recipe_of
from ctxext.pipeline.verify import verify_checkpoint


@pytest.mark.parametrize(
    ("family", "rope_type"),
    [
        pytest.param("gemma3_text", "yarn", id="one RoPE per layer type"),
        pytest.param("phi3", "longrope", id="maps only, attention factor folded on export"),
        pytest.param("gemma2", "yarn", id="soft-capped scores, which a CPU computes slowly"),
        pytest.param("deepseek_v3", "yarn", id="latent attention with a temperature of its own"),
    ],
)
def test_train_merge_and_verify(family: str, rope_type: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    with quiet():
        build(tiny_family_config(family, vocab_size=260, eos_token_id=256, bos_token_id=None)).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    values = recipe_values(str(model), str(write_suite(tmp_path / "suite.yaml")), str(tmp_path / "run"))
    values["train"]["allow_slow"] = family == "gemma2"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    extend(recipe_of(str(tmp_path / "recipe.yaml"), [], None, None), SilentReporter())
    for part in ("merged", "adapter"):
        lines = list(verify_checkpoint(tmp_path / "run" / part))
        assert any("positions in effect" in line for line in lines)
    config = read_json(tmp_path / "run" / "merged" / "config.json")
    parameters = config["rope_parameters"]
    assert parameters.get("full_attention", parameters)["rope_type"] == rope_type
    if family == "gemma3_text":
        assert parameters["sliding_attention"]["rope_type"] == "default"
    if family == "phi3":
        assert "attention_factor" not in parameters
