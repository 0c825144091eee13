"""Both forms of an exported config say the same: to transformers 5, and to transformers 4.57 itself.

The second part runs when CTXEXT_READERS_DIR names a folder of environments, one of which (`transformers4` or `t4`) has
transformers 4.57; otherwise it is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rope.tiny_families import build, causal_families, tiny_family_config
from support import child_environment
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, PreTrainedConfig, SiglipVisionConfig

from ctxext.errors import CtxextError
from ctxext.export.checkpoint import _EXACT_SCALING, add_older_form, has_older_form, older_form_gap, write_both_forms
from ctxext.export.patch import patch_checkpoint
from ctxext.model.load import quiet
from ctxext.rope.families import base_ropes, classify, text_config
from ctxext.rope.patchers import extend_config
from ctxext.rope.reference import reference_tables

TARGET = 512
TOLERANCE = 1e-4
LENGTHS = (12, 450)  # within the original 128 positions, and beyond

# Families that transformers 4.57 knows too; every kind of attention and of config that it has.
FAMILIES = (
    "llama mistral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text gemma3n_text olmo olmo2 olmo3 gpt_neox phi phi3 "
    "phimoe stablelm glm glm4 mixtral granite starcoder2 cohere smollm3 deepseek_v2 deepseek_v3 nemotron falcon"
).split()
# Where `older_form_gap` says that transformers 4.57 is not right: its form by family; each must be seen to be wrong.
GAPS = {
    "olmo": ("yarn", "llama3", "portable", "two-range"),
    "olmo2": ("yarn", "llama3", "portable", "two-range"),
    "olmo3": ("ntk",),
    "deepseek_v2": ("yarn",),
    "nemotron": ("yarn", "linear", "llama3", "portable", "two-range"),
}
# What ctxext refuses to write for these.
NOT_WRITTEN = {
    "phimoe": ("two-range",),
    "deepseek_v2": ("portable",),
    "deepseek_v3": ("portable",),
    "falcon": ("portable",),
}

READ_BY_TRANSFORMERS_4 = """
import json, sys, warnings
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
assert transformers.__version__.startswith("4.57"), transformers.__version__
root, answers = Path(sys.argv[1]), {}
for folder, lengths in json.loads((root / "folders.json").read_text()).items():
    try:
        model = AutoModelForCausalLM.from_pretrained(root / folder, dtype=torch.float32, attn_implementation="eager")
        answers[folder] = []
        for length in lengths:
            ids = (torch.arange(length)[None] * 7) % 80 + 10
            with torch.inference_mode():
                answers[folder].append(model.eval()(input_ids=ids, use_cache=False).logits[:, -4:])
    except Exception as error:
        answers[folder] = f"{type(error).__name__}: {error}"
torch.save(answers, root / "answers.pt")
"""


def extended_configs() -> list[tuple[str, PreTrainedConfig]]:
    """Every causal family of transformers that can be configured tiny and extended, by the first method that fits."""
    found = []
    for family in causal_families():
        try:
            config = tiny_family_config(family)
        except Exception:  # tests/rope/test_families.py looks after those
            continue
        if classify(config).kind == "refused":
            continue
        for method in ("yarn", "linear"):
            try:
                found.append(
                    (family, extend_config(config, method=method, target_length=TARGET, on_existing="replace"))
                )
                break
            except CtxextError:
                continue
    return found


def reread(config: PreTrainedConfig, folder: Path) -> PreTrainedConfig:
    """What transformers 5 reads from the config with both forms."""
    with quiet():
        config.save_pretrained(folder)
        write_both_forms(folder)
        return AutoConfig.from_pretrained(folder)


def test_transformers_5_reads_both_forms_back_as_the_same_positions_in_every_family(tmp_path: Path) -> None:
    families = extended_configs()
    assert len(families) >= 75
    for family, config in families:
        again = text_config(reread(config, tmp_path / family))
        text = text_config(config)
        parameters = again.rope_parameters
        if text.model_type in _EXACT_SCALING:  # transformers 4 accepts no further entries, which follow from the others
            parameters = {"factor": 1.0, **{key: value for key, value in parameters.items() if key != "type"}}
        kept = {key: value for key, value in parameters.items() if text.rope_parameters.get(key) is not None}
        assert kept == {key: value for key, value in text.rope_parameters.items() if value is not None}, family
        assert again.max_position_embeddings == text.max_position_embeddings
        mine, theirs = reference_tables(again), reference_tables(config)
        for group, table in theirs.items():
            assert mine[group].inv_freq.tolist() == table.inv_freq.tolist(), family
            assert mine[group].attention_factor == pytest.approx(table.attention_factor, abs=1e-12), family


def test_a_multimodal_config_carries_the_older_keys_in_its_text_part(tmp_path: Path) -> None:
    config = extend_config(tiny_gemma3(), method="yarn", target_length=TARGET)
    written = add_older_form(config.to_dict())
    assert "rope_scaling" not in written
    text = written["text_config"]
    assert text["rope_scaling"]["rope_type"] == "yarn"
    assert text["rope_theta"] == text["rope_parameters"]["full_attention"]["rope_theta"]
    assert text["rope_local_base_freq"] == text["rope_parameters"]["sliding_attention"]["rope_theta"]
    again = text_config(reread(config, tmp_path))
    assert again.rope_parameters == text_config(config).rope_parameters
    assert again.max_position_embeddings == TARGET


def test_a_family_that_transformers_4_cannot_read_is_named_with_the_reason() -> None:
    nested = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}, "sliding_attention": None}
    gap = older_form_gap({"model_type": "laguna", "rope_parameters": nested})
    assert gap is not None
    assert "one RoPE per layer type" in gap
    assert not has_older_form({"model_type": "laguna", "rope_parameters": nested})
    plain = {"rope_type": "default", "rope_theta": 1e4}
    for family in ("llama", "nemotron", "olmo2", "phi3"):
        assert older_form_gap({"model_type": family, "rope_parameters": plain}) is None
    stock_map = {**plain, "rope_type": "longrope", "attention_factor": 1.1}
    assert "attention factor" in str(older_form_gap({"model_type": "phi3", "rope_parameters": stock_map}))


def tiny_gemma3() -> Gemma3Config:
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = tiny_family_config("gemma3_text").to_dict()
    return Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4, image_token_index=3)


@dataclass(frozen=True)
class Form:
    """How `ctxext patch` is asked."""

    method: str
    portable: bool | None = None

    def parameters(self, half: int) -> dict[str, Any]:
        if self.method != "longrope":
            return {}
        growing = [index / max(1, half - 1) for index in range(half)]
        return {"long_factor": [1 + 3 * part for part in growing], "short_factor": [1 + part / 2 for part in growing]}


FORMS = {
    "yarn": Form("yarn"),
    "linear": Form("linear"),
    "llama3": Form("llama3"),
    "ntk": Form("ntk"),
    "portable": Form("yarn", portable=True),
    "two-range": Form("longrope"),
}


def transformers_4() -> Path:
    readers = os.environ.get("CTXEXT_READERS_DIR")
    if not readers:
        pytest.skip("CTXEXT_READERS_DIR is not set, so there is no transformers 4.57 to ask")
    for name in ("transformers4", "t4"):
        if (Path(readers) / name / "bin" / "python").exists():
            return Path(readers) / name / "bin" / "python"
    pytest.skip(f"{readers} has no environment with transformers 4.57")


def logits(folder: Path) -> list[torch.Tensor]:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for length in LENGTHS:
        ids = (torch.arange(length)[None] * 7) % 80 + 10
        with torch.inference_mode():
            answers.append(model(input_ids=ids, use_cache=False).logits[:, -4:])
    return answers


def write_base(config: PreTrainedConfig, folder: Path) -> Path:
    """A random model whose norms and biases are random too, with both forms like anything that is asked here."""
    model = build(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with quiet():
        model.save_pretrained(folder)
    write_both_forms(folder)
    return folder


@dataclass(frozen=True)
class Asked:
    """One checkpoint: what transformers 5 computes from it, and whether transformers 4 is said to read it."""

    expected: list[torch.Tensor]
    gap: str | None


def write_all(root: Path) -> tuple[dict[str, Asked], list[str]]:
    """Every family in every form below `root`; and which `FAMILY@FORM` ctxext refused to write."""
    asked: dict[str, Asked] = {}
    refused = []
    configs = {family: tiny_family_config(family) for family in FAMILIES} | {"gemma3": tiny_gemma3()}
    for family, config in configs.items():
        base = write_base(config, root / f"{family}@base")
        asked[base.name] = Asked(logits(base), None)
        half = base_ropes(config, "replace")[0].rotary_dim // 2
        for name, form in FORMS.items():
            folder = root / f"{family}@{name}"
            try:
                report = patch_checkpoint(
                    str(base),
                    folder,
                    method=form.method,
                    target_length=TARGET,
                    portable=form.portable,
                    on_existing="replace",
                    **form.parameters(half),
                )
            except CtxextError:
                refused.append(folder.name)
                continue
            asked[folder.name] = Asked(logits(folder), report.older_form_gap)
            if report.older_form_gap:
                assert any(report.older_form_gap in line for line in report.lines())
    return asked, refused


def named(table: dict[str, tuple[str, ...]]) -> set[str]:
    return {f"{family}@{form}" for family, forms in table.items() for form in forms}


def test_transformers_4_computes_the_same_from_every_family_in_every_form(tmp_path: Path) -> None:
    python = transformers_4()
    asked, refused = write_all(tmp_path)
    assert set(refused) == named(NOT_WRITTEN)
    assert {name for name, one in asked.items() if one.gap} == named(GAPS)
    (tmp_path / "folders.json").write_text(json.dumps(dict.fromkeys(asked, LENGTHS)))
    command = [str(python), "-c", READ_BY_TRANSFORMERS_4, str(tmp_path)]
    subprocess.run(command, check=True, env=child_environment(), cwd=tmp_path, timeout=500)
    answers = torch.load(tmp_path / "answers.pt")
    wrong, num_same = {}, 0
    for name, one in asked.items():
        answer = answers[name]
        if isinstance(answer, str):
            difference = float("inf")
        else:
            pairs = zip(answer, one.expected, strict=True)
            difference = max(float((theirs - mine).abs().max()) for theirs, mine in pairs)
        if one.gap:
            assert difference > 10 * TOLERANCE, f"{name} is read right, although: {one.gap}"
        elif difference > TOLERANCE:
            wrong[name] = answer if isinstance(answer, str) else difference
        else:
            num_same += 1
    assert not wrong
    assert num_same == len(asked) - len(named(GAPS)) >= 170
    # The prompts do tell a scaling that is not read from one that is.
    unscaled, scaled = asked["llama@base"].expected[1], asked["llama@yarn"].expected[1]
    assert float((unscaled - scaled).abs().max()) > 10 * TOLERANCE
