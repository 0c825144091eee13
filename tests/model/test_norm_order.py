"""Post-norm models are found by what their attention receives, and advised of a longer warmup."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from rope.tiny_families import build, causal_families, tiny_family_config
from support import byte_tokenizer, make_job, recipe_values, write_suite

from ctxext.model.load import quiet
from ctxext.model.norm_order import is_post_norm
from ctxext.pipeline.recipes import recipe_of
from ctxext.planning.plan import make_plan

POST_NORM = {"exaone4", "flex_olmo", "olmo2", "olmo3", "olmo_hybrid"}


@pytest.mark.parametrize("family", sorted(POST_NORM))
def test_families_without_a_norm_before_attention_are_post_norm(family: str) -> None:
    assert is_post_norm(tiny_family_config(family))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("llama", id="llama"),
        pytest.param("gemma2", id="norms before and behind"),
        pytest.param("gemma3_text", id="norms before and behind, two kinds of layers"),
        pytest.param("phi", id="attention and MLP side by side"),
        pytest.param("olmo", id="norms without weights"),
        pytest.param("mixtral", id="experts"),
        pytest.param("modernbert-decoder", id="embeddings normalised instead of the first layer's input"),
        pytest.param("falcon_mamba", id="no attention"),
    ],
)
def test_families_that_normalise_first_are_not(family: str) -> None:
    assert not is_post_norm(tiny_family_config(family))


def test_the_names_above_are_families() -> None:
    assert set(causal_families()) >= POST_NORM


def plan_notes(folder: Path, family: str, *overrides: str) -> list[str]:
    model = folder / "model"
    with quiet():
        build(tiny_family_config(family, vocab_size=260, eos_token_id=256, bos_token_id=None)).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    values = recipe_values(str(model), str(write_suite(folder / "suite.yaml")), str(folder / "run"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return make_plan(recipe_of(str(folder / "recipe.yaml"), list(overrides))).notes


def test_a_short_warmup_of_a_post_norm_model_is_advised_against(tmp_path: Path) -> None:
    settings = ("train.steps=200",)
    notes = [note for note in plan_notes(tmp_path, "olmo2", *settings) if "post-norm" in note]
    assert len(notes) == 1
    assert "train.warmup=0.1 or more is advised, here it is 0.05 (10 steps)" in notes[0]
    assert not any("post-norm" in note for note in plan_notes(tmp_path, "olmo2", *settings, "train.warmup=0.1"))


def test_a_pre_norm_model_gets_no_such_advice(tmp_path: Path) -> None:
    assert not any("warmup" in note for note in make_plan(make_job(tmp_path).recipe("train.warmup=0.01")).notes)
