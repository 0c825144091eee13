"""Settings for other programs, merged the way each program does it, give the frequencies of our own formulas."""

from __future__ import annotations

import copy
import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ctxext.errors import UsageError
from ctxext.export.settings import SOURCES, Settings, SettingsRefusedError, settings_for, settings_lines
from ctxext.rope.methods import BaseRope, RopeTable, create_method

ORIGINAL, TARGET, THETA, HEAD_DIM = 4096, 16384, 10_000.0, 32
HALF = HEAD_DIM // 2
BASE = BaseRope(theta=THETA, rotary_dim=HEAD_DIM, original_length=ORIGINAL)
LONG = [1.0 + 3.0 * i / (HALF - 1) for i in range(HALF)]
SHORT = [1.0 + i / (HALF - 1) for i in range(HALF)]

# Every kind of dict that an extension is written as.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "ntk": ("ntk", {}),
    "theta": ("theta", {"theta": 500_000.0}),
    "yarn": ("yarn", {}),
    "yarn, own attention factor": ("yarn", {"attention_factor": 1.25}),
    "yarn, own betas": ("yarn", {"beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn, not truncated": ("yarn", {"truncate": False}),
    "llama3": ("llama3", {}),
    "longrope, one range": ("longrope", {"long_factor": LONG}),
    "longrope, two ranges": ("longrope", {"long_factor": LONG, "short_factor": SHORT}),
    "map with attention factor 1": ("ntk-by-parts", {}),
}
ONE_RANGE = [name for name in METHODS if name != "longrope, two ranges"]


def extension(name: str) -> tuple[dict[str, Any], RopeTable]:
    """The extended `rope_parameters` of a method and our own table for it."""
    method, parameters = METHODS[name]
    resolved = create_method(method, **parameters).resolved(ORIGINAL, TARGET)
    return resolved.rope_parameters(BASE), resolved.table(BASE)


def settings(program: str, name: str) -> Settings:
    return settings_for(program, extension(name)[0], ORIGINAL, TARGET, THETA)


def base_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=2 * HEAD_DIM,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )


def flags(text: str) -> dict[str, str]:
    """`--flag value` pairs as a shell would hand them over."""
    words = shlex.split(text)
    return dict(zip(words[::2], words[1::2], strict=True))


def assert_same(config: Any, expected: RopeTable, *, prompt_length: int = TARGET) -> None:
    """What transformers rotates by for a prompt of that length is our own table."""
    module = LlamaRotaryEmbedding(config)
    module(torch.zeros(1), torch.tensor([[prompt_length - 1]]))
    np.testing.assert_allclose(module.inv_freq.numpy(), expected.inv_freq, rtol=3e-6)
    assert module.attention_scaling == pytest.approx(expected.attention_factor, rel=1e-6)


def overridden(override: str) -> LlamaConfig:
    """A config with top-level keys set, as vLLM and SGLang do after loading it."""
    config = base_config()
    for key, value in json.loads(override).items():
        setattr(config, key, value)
    return config


def served_attention_factor(program: str, rope: dict[str, Any]) -> float:
    """What vLLM 0.32 and SGLang 0.5.23 multiply cos and sin by, from the keys that they read."""
    if rope["rope_type"] == "yarn":
        default = 0.1 * math.log(rope["factor"]) + 1.0
        return rope.get("attention_factor", default) if program == "vllm" else default * rope.get("attn_factor", 1.0)
    return rope["long_mscale"] if rope["rope_type"] == "longrope" else 1.0


@pytest.mark.parametrize("name", METHODS)
def test_vllm_overrides_give_our_frequencies(name: str) -> None:
    given = flags(settings("vllm", name).text)
    config = overridden(given["--hf-overrides"])
    assert given["--max-model-len"] == str(TARGET) == str(config.max_position_embeddings)
    assert_same(config, extension(name)[1])
    factor = served_attention_factor("vllm", config.rope_parameters)
    assert factor == pytest.approx(extension(name)[1].attention_factor)


@pytest.mark.parametrize("name", ONE_RANGE)
def test_sglang_overrides_give_our_frequencies(name: str) -> None:
    given = flags(settings("sglang", name).text)
    config = overridden(given["--json-model-override-args"])
    assert given["--context-length"] == str(TARGET)
    expected = extension(name)[1]
    module = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(module.inv_freq.numpy(), expected.inv_freq, rtol=3e-6)
    factor = served_attention_factor("sglang", config.rope_parameters)
    assert factor == pytest.approx(expected.attention_factor)


def test_sglang_one_range_never_reaches_the_end_of_its_short_table() -> None:
    rope = json.loads(flags(settings("sglang", "longrope, one range").text)["--json-model-override-args"])
    assert rope["rope_parameters"]["original_max_position_embeddings"] == rope["max_position_embeddings"] == TARGET


@pytest.mark.parametrize("name", METHODS)
def test_axolotl_yaml_gives_our_frequencies(name: str) -> None:
    parsed = yaml.safe_load(settings("axolotl", name).text)
    assert parsed["sequence_len"] == TARGET
    config = base_config()
    for key, value in parsed["overrides_of_model_config"].items():
        setattr(config, key, value)
    assert_same(config, extension(name)[1])


def as_llamafactory_does(parsed: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The dict and length that LLaMA-Factory 0.9.5 puts on a config of transformers 4."""
    factor = float(math.ceil(parsed["cutoff_len"] / ORIGINAL))
    rope: dict[str, Any] = {"rope_type": parsed["rope_scaling"], "factor": factor}
    if parsed["rope_scaling"] in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = ORIGINAL
    if parsed["rope_scaling"] == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return rope, ORIGINAL * factor


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3"])
def test_llamafactory_yaml_gives_our_frequencies(name: str) -> None:
    rope, length = as_llamafactory_does(yaml.safe_load(settings("llamafactory", name).text))
    assert length == TARGET
    config = base_config()
    config.max_position_embeddings = TARGET
    config.rope_parameters = {**rope, "rope_theta": THETA}
    assert_same(config, extension(name)[1])


@pytest.mark.parametrize("name", METHODS)
def test_transformers_snippet_runs_and_gives_our_frequencies(name: str, tmp_path: Path) -> None:
    LlamaForCausalLM(base_config()).save_pretrained(tmp_path)
    scope: dict[str, Any] = {}
    exec(settings("transformers", name).text.replace("MODEL", str(tmp_path)), scope)
    assert scope["model"].config.max_position_embeddings == TARGET
    assert_same(scope["model"].config, extension(name)[1])


def test_two_ranges_keep_their_short_range_on_the_way() -> None:
    config = overridden(flags(settings("vllm", "longrope, two ranges").text)["--hf-overrides"])
    short = extension("longrope, two ranges")[1].short_inv_freq
    assert short is not None
    np.testing.assert_allclose(LlamaRotaryEmbedding(config).inv_freq.numpy(), short, rtol=3e-6)


def test_lines_end_with_the_source() -> None:
    lines = settings_lines(settings("vllm", "yarn"))
    assert lines[0].startswith("--hf-overrides")
    assert lines[-1] == f"source: {SOURCES['vllm'].url} (0.32.0, checked {SOURCES['vllm'].checked.isoformat()})"


def test_transformers_keeps_the_original_length_for_dynamic() -> None:
    rope = create_method("dynamic").resolved(ORIGINAL, TARGET).rope_parameters(BASE)
    text = settings_for("transformers", rope, ORIGINAL, TARGET, THETA).text
    assert f"max_position_embeddings = {ORIGINAL}\n" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", "--rope-scaling linear --rope-scale 4 -c 16384"),
        ("theta", "--rope-freq-base 500000 -c 16384"),
        ("yarn", "--rope-scaling yarn --rope-scale 4 --yarn-orig-ctx 4096 -c 16384"),
        (
            "yarn, own betas",
            "--rope-scaling yarn --rope-scale 4 --yarn-orig-ctx 4096 --yarn-beta-fast 16 --yarn-beta-slow 2 -c 16384",
        ),
    ],
)
def test_llamacpp_flags(name: str, expected: str) -> None:
    assert settings("llamacpp", name).text == expected


def test_llamacpp_theta_reads_back_as_the_same_number() -> None:
    given = flags(settings("llamacpp", "ntk").text)
    assert float(given["--rope-freq-base"]) == extension("ntk")[0]["rope_theta"]


@pytest.mark.parametrize(
    ("program", "name", "reason"),
    [
        ("sglang", "longrope, two ranges", "once per batch"),
        ("llamacpp", "yarn, own attention factor", "overwritten"),
        ("llamacpp", "yarn, not truncated", "truncate"),
        ("llamacpp", "llama3", "none, linear or yarn"),
        ("llamacpp", "longrope, one range", "rope_freqs"),
        ("llamacpp", "longrope, two ranges", "rope_freqs"),
        ("llamafactory", "ntk", "without theta"),
        ("llamafactory", "theta", "without theta"),
        ("llamafactory", "longrope, one range", "factors of your own"),
        ("llamafactory", "yarn, own attention factor", "attention_factor"),
        ("llamafactory", "yarn, own betas", "beta_fast, beta_slow"),
        ("llamafactory", "yarn, not truncated", "truncate"),
    ],
)
def test_what_cannot_be_said_is_refused_with_the_reason(program: str, name: str, reason: str) -> None:
    with pytest.raises(SettingsRefusedError, match=reason) as caught:
        settings(program, name)
    assert caught.value.program == program
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("program", ["vllm", "sglang", "llamacpp", "axolotl", "llamafactory"])
def test_dynamic_is_refused_outside_transformers(program: str) -> None:
    rope = create_method("dynamic").resolved(ORIGINAL, TARGET).rope_parameters(BASE)
    with pytest.raises(SettingsRefusedError):
        settings_for(program, rope, ORIGINAL, TARGET, THETA)


def test_llamafactory_refuses_a_factor_that_it_would_round_up() -> None:
    rope = create_method("yarn").resolved(ORIGINAL, 10_000).rope_parameters(BASE)
    with pytest.raises(SettingsRefusedError, match="rounded up to 3"):
        settings_for("llamafactory", rope, ORIGINAL, 10_000, THETA)


NESTED = {
    "full_attention": extension("yarn")[0],
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "no_positions": None,
}


@pytest.mark.parametrize("program", ["sglang", "llamacpp", "llamafactory"])
def test_one_rope_per_layer_type_is_refused_where_settings_are_flat(program: str) -> None:
    with pytest.raises(SettingsRefusedError):
        settings_for(program, NESTED, ORIGINAL, TARGET, THETA)


def test_one_rope_per_layer_type_travels_whole_where_it_can() -> None:
    vllm = json.loads(flags(settings_for("vllm", NESTED, ORIGINAL, TARGET, THETA).text)["--hf-overrides"])
    axolotl = yaml.safe_load(settings_for("axolotl", NESTED, ORIGINAL, TARGET, THETA).text)
    assert vllm["rope_parameters"] == axolotl["overrides_of_model_config"]["rope_parameters"] == NESTED


def test_unknown_program_is_a_usage_error_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'vllm'"):
        settings_for("vlm", extension("yarn")[0], ORIGINAL, TARGET, THETA)


@pytest.mark.parametrize("program", SOURCES)
def test_every_program_names_its_source_and_leaves_its_argument_alone(program: str) -> None:
    rope = extension("yarn")[0]
    before = copy.deepcopy(rope)
    result = settings_for(program, rope, ORIGINAL, TARGET, THETA)
    assert result.source.url.startswith("https://")
    assert result.notes
    assert rope == before


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_axolotl_warning_about_rope_scaling_is_still_true(tmp_path: Path) -> None:
    """Why the lines say `rope_parameters`: what axolotl's documentation says loses theta in transformers 5."""
    base_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.rope_scaling = {"rope_type": "linear", "factor": 4.0}
    assert config.rope_parameters.get("rope_theta") is None
