"""The chosen attention is measured beside eager attention: smaller, equal in what it computes, or refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support import tiny_config
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctxext.errors import ResourceError
from ctxext.model.attention_choice import AttentionChoice, AttentionHost, choose_attention
from ctxext.planning.attention_gain import AttentionGain, LayerCost, eager_comparison

CPU = torch.device("cpu")
LLAMA = tiny_config(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
GEMMA3 = AutoConfig.for_model(
    "gemma3_text",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_hidden_layers=2,
    sliding_window=64,
    layer_types=["sliding_attention", "full_attention"],
)


def compare(config: PreTrainedConfig, choice: AttentionChoice | None = None, **changes: Any) -> AttentionGain:
    budget = changes.pop("budget_bytes", None)
    values: dict[str, Any] = {"window_tokens": 512, **changes}
    if choice is None:
        choice = choose_attention(config, AttentionHost.of(CPU), torch.float32, **values, allow_slow=True)
    return eager_comparison(config, CPU, torch.float32, choice, **values, budget_bytes=budget)


@pytest.mark.parametrize(("config", "isolated"), [(LLAMA, False), (LLAMA, True), (GEMMA3, False), (GEMMA3, True)])
def test_the_choice_computes_the_same_in_much_less_memory(config: PreTrainedConfig, isolated: bool) -> None:
    gain = compare(config, isolated=isolated)
    assert gain.error < 1e-5
    scores = 4 * 512 * 512 * 4
    assert gain.eager.peak_bytes > 2 * scores
    assert gain.chosen.peak_bytes < scores
    assert gain.memory_ratio > 4
    assert gain.chosen.seconds > 0


def test_soft_capping_is_measured_as_eager_attention_computes_it() -> None:
    gemma2 = AutoConfig.for_model("gemma2", num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    gain = compare(gemma2, window_tokens=128)
    assert (gain.implementation, gain.error) == ("eager", 0.0)


def test_the_length_is_what_eager_attention_has_room_for() -> None:
    assert compare(LLAMA, window_tokens=131_072, budget_bytes=1 << 23).length_tokens == 256
    assert compare(LLAMA, window_tokens=96).length_tokens == 96


def scaled_wrongly(module: Any, *tensors: Tensor, scaling: float, **arguments: Any) -> Any:
    return sdpa_attention_forward(module, *tensors, scaling=1.1 * scaling, **arguments)


def test_attention_that_computes_something_else_is_refused() -> None:
    AttentionInterface.register("scaled_wrongly", scaled_wrongly)
    AttentionMaskInterface.register("scaled_wrongly", sdpa_mask)
    with pytest.raises(ResourceError, match="something else than eager attention"):
        compare(LLAMA, AttentionChoice("scaled_wrongly", "as asked"))


def test_attention_that_does_not_run_is_refused_and_no_alternative() -> None:
    with pytest.raises(ResourceError, match="flash_attention_2"):
        compare(LLAMA, AttentionChoice("flash_attention_2", "as asked"))
    gain = compare(LLAMA, AttentionChoice("sdpa", "plain", None, ("flash_attention_2", "ctxext_documents")))
    assert list(gain.others) == ["ctxext_documents"]


GAIN = AttentionGain("flex_attention", 1024, LayerCost(0.10, 1 << 20), LayerCost(0.2, 1 << 24), {"sdpa": 0.072}, 0.0)


def test_a_setting_that_costs_a_third_of_the_speed_is_refused_unless_allowed() -> None:
    GAIN.require_worthwhile(allow_slow=False)  # 28%
    slow = dataclasses.replace(GAIN, others={"sdpa": 0.069})
    slow.require_worthwhile(allow_slow=True)
    with pytest.raises(
        ResourceError, match=r"costs 31% of the attention speed that sdpa reaches.*train\.attention=sdpa"
    ):
        slow.require_worthwhile(allow_slow=False)


def test_slower_than_eager_attention_counts_too() -> None:
    with pytest.raises(ResourceError, match="eager"):
        dataclasses.replace(GAIN, others={}, eager=LayerCost(0.05, 1 << 24)).require_worthwhile(allow_slow=False)


def test_the_gain_is_said_in_one_line() -> None:
    assert GAIN.describe() == (
        "flex_attention at 1,024 tokens, one layer forward and backward: 2.0 times as fast as eager attention in "
        "1.0 MiB instead of 16.0 MiB"
    )
