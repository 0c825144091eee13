"""Extended configs are complete, leave their argument alone, and take effect; what cannot be extended is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from ctxext.errors import UnsupportedModelError, UsageError
from ctxext.model.load import quiet
from ctxext.rope.families import classify
from ctxext.rope.patchers import extend_config
from ctxext.rope.verify import verify_positions

ORIGINAL, TARGET = 128, 512

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": ORIGINAL,
}
GROUPED: dict[str, Any] = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
DEFAULT_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 20000.0}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, rope_parameters=dict(DEFAULT_ROPE)),
    "llama with wide heads": LlamaConfig(**GROUPED, head_dim=32, rope_parameters=dict(DEFAULT_ROPE)),
    "qwen2": Qwen2Config(**GROUPED, rope_parameters=dict(DEFAULT_ROPE)),
    "qwen3": Qwen3Config(**GROUPED, head_dim=32, rope_parameters=dict(DEFAULT_ROPE)),
    "mistral": MistralConfig(**GROUPED, rope_parameters=dict(DEFAULT_ROPE)),
    "phi3, which takes longrope alone": Phi3Config(**GROUPED, pad_token_id=0, rope_parameters=dict(DEFAULT_ROPE)),
    "mixtral, whose head_dim is open": MixtralConfig(
        **GROUPED, num_local_experts=2, rope_parameters=dict(DEFAULT_ROPE)
    ),
    "gpt-neox, a half rotated": GPTNeoXConfig(
        **SIZES, intermediate_size=96, rope_parameters={**DEFAULT_ROPE, "partial_rotary_factor": 0.5}
    ),
    "phi, a quarter rotated": PhiConfig(
        **SIZES, intermediate_size=96, rope_parameters={**DEFAULT_ROPE, "partial_rotary_factor": 0.25}
    ),
    "stablelm, a quarter rotated": StableLmConfig(
        **GROUPED, rope_parameters={**DEFAULT_ROPE, "partial_rotary_factor": 0.25}
    ),
    "falcon": FalconConfig(**SIZES, rope_parameters=dict(DEFAULT_ROPE)),
}
METHODS: list[dict[str, Any]] = [
    {"method": "yarn"},
    {"method": "yarn", "attention_factor": 1.0, "truncate": False, "beta_fast": 16.0},
    {"method": "linear"},
    {"method": "none", "control": True},
]

family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
method = pytest.mark.parametrize("settings", METHODS, ids=["yarn", "yarn with everything set", "linear", "none"])


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    return model


@family
@method
def test_a_model_built_from_the_extended_config_has_its_positions_in_effect(
    config: PreTrainedConfig, settings: dict[str, Any]
) -> None:
    before = copy.deepcopy(config.to_dict())
    extended = extend_config(config, target_length=TARGET, **settings)
    assert config.to_dict() == before
    verification = verify_positions(build(extended), extended)
    assert verification.num_modules >= 1
    assert verification.target_length == TARGET


@family
@method
def test_the_extended_config_is_complete(config: PreTrainedConfig, settings: dict[str, Any]) -> None:
    extended = extend_config(config, target_length=TARGET, **settings)
    assert type(extended) is type(config)
    assert type(extended.max_position_embeddings) is int
    assert extended.max_position_embeddings == TARGET
    parameters = extended.rope_parameters
    assert parameters["rope_theta"] == 20000.0
    assert parameters.get("partial_rotary_factor") == config.rope_parameters.get("partial_rotary_factor")
    if settings["method"] != "none" and classify(config).kind == "only as map":
        # Readers derive an attention factor from these two, which must come out as 1.
        assert parameters["rope_type"] == "longrope"
        assert (parameters["factor"], parameters["original_max_position_embeddings"]) == (1.0, TARGET)
        assert parameters["short_factor"] == parameters["long_factor"]
        return
    if settings["method"] == "yarn":
        assert type(parameters["original_max_position_embeddings"]) is int
        assert parameters["original_max_position_embeddings"] == ORIGINAL
    if settings["method"] != "none":
        assert parameters["factor"] == TARGET / ORIGINAL


@method
def test_the_argument_is_not_shared_with_the_result(settings: dict[str, Any]) -> None:
    config = copy.deepcopy(FAMILIES["llama"])
    extended = extend_config(config, target_length=TARGET, **settings)
    extended.rope_parameters["rope_theta"] = 1.0
    extended.max_position_embeddings = 1
    assert config.rope_parameters == DEFAULT_ROPE
    assert config.max_position_embeddings == ORIGINAL


def test_the_forward_pass_agrees_with_a_config_written_by_hand() -> None:
    by_hand = LlamaConfig(
        **{**GROUPED, "max_position_embeddings": TARGET},
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 20000.0,
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        },
    )
    extended = extend_config(FAMILIES["llama"], target_length=TARGET)
    ids = torch.arange(300).remainder(97)[None]
    with torch.no_grad():
        expected = build(by_hand)(ids).logits
        torch.testing.assert_close(build(extended)(ids).logits, expected, rtol=0, atol=0)
        unscaled = build(extend_config(FAMILIES["llama"], method="none", control=True, target_length=TARGET))
        assert (unscaled(ids).logits - expected).abs().max() > 1e-3


def edited(config: PreTrainedConfig, **values: Any) -> PreTrainedConfig:
    """A config as a careless writer leaves it behind; constructors check more than files do."""
    config = copy.deepcopy(config)
    for key, value in values.items():
        setattr(config, key, value)
    return config


REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "gpt2": (GPT2Config(), "learned absolute positions"),
    "opt": (OPTConfig(), "learned absolute positions"),
    "bloom": (BloomConfig(), "ALiBi"),
    "mpt": (MptConfig(), "ALiBi"),
    "falcon with alibi": (FalconConfig(alibi=True), "ALiBi"),
    "mamba": (MambaConfig(), "no positions"),
    "gptj": (GPTJConfig(), "buffers of its own"),
    "llama3-scaled": (
        LlamaConfig(
            **GROUPED,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        "already scaled; got 'llama3'",
    ),
    "yarn-scaled": (extend_config(FAMILIES["llama"], target_length=256), "already scaled; got 'yarn'"),
    "only sliding layers rotate": (Cohere2Config(), "only its sliding-window or chunked layers rotate"),
    "odd rotary dimension": (edited(FAMILIES["llama"], head_dim=15), "must be even"),
    "no length": (edited(FAMILIES["llama"], max_position_embeddings=0), "how many positions"),
    "no base": (edited(FAMILIES["llama"], rope_parameters={"rope_type": "default"}), "RoPE base"),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_extended_is_refused_with_the_reason(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        extend_config(config, target_length=1 << 20)


@pytest.mark.parametrize("target", [ORIGINAL, ORIGINAL - 1, 0, -TARGET])
def test_a_target_not_above_the_original_is_refused(target: int) -> None:
    with pytest.raises(UsageError, match=f"more than {ORIGINAL}"):
        extend_config(FAMILIES["llama"], target_length=target)


@pytest.mark.parametrize("target", [512.0, True, "512", None])
def test_a_target_that_is_no_integer_is_refused(target: Any) -> None:
    with pytest.raises(UsageError, match="must be an integer"):
        extend_config(FAMILIES["llama"], target_length=target)
