"""What computes attention follows the documented table; what cannot, or only slowly, is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny_config
from test_windowed import WINDOW, config_of
from transformers import AutoConfig, PreTrainedConfig

from ctxext.errors import CtxextError, ResourceError, UnsupportedModelError, UsageError
from ctxext.model.attention_choice import ELSEWHERE, AttentionChoice, AttentionHost, choose_attention
from ctxext.model.documents import DOCUMENTS

FLEX = {"flex_attention"}
HOPPER = AttentionHost("cuda", {"flex_attention", "flash_attention_2", "flash_attention_3"}, 9)
AMPERE = AttentionHost("cuda", {"flex_attention", "flash_attention_2"}, 8)
BARE = AttentionHost("cuda", FLEX, 9)
HOSTS = {
    "cuda": BARE,
    "rocm": AttentionHost("rocm", FLEX),
    "mps": AttentionHost("mps"),
    "cpu": AttentionHost("cpu"),
}
LLAMA = tiny_config()
GEMMA2, GPT_OSS, GEMMA3 = (config_of(name) for name in ("gemma2", "gpt_oss", "gemma3_text"))
LLAMA4 = AutoConfig.for_model(
    "llama4_text",
    attention_chunk_size=64,
    num_hidden_layers=4,
    layer_types=["chunked_attention", "full_attention"] * 2,
)
QWEN3_NEXT = AutoConfig.for_model("qwen3_next")
LONG = 4 * WINDOW


def choose(config: PreTrainedConfig, host: AttentionHost, asked: str = "auto", **changes: Any) -> AttentionChoice:
    return choose_attention(
        config, host, changes.pop("dtype", torch.bfloat16), asked, **{"window_tokens": LONG, **changes}
    )


def refusal(kind: type[CtxextError], *arguments: Any, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        choose(*arguments, **changes)
    return str(caught.value)


@pytest.mark.parametrize("host", HOSTS)
def test_plainly_causal_models_get_sdpa_on_every_device(host: str) -> None:
    choice = choose(LLAMA, HOSTS[host])
    assert (choice.implementation, choice.slow) == ("sdpa", None)


@pytest.mark.parametrize("host", HOSTS)
def test_isolated_documents_and_sliding_windows_get_no_mask_on_any_device(host: str) -> None:
    for config, isolated in ((LLAMA, True), (GEMMA3, False), (GEMMA3, True)):
        choice = choose(config, HOSTS[host], isolated=isolated)
        assert (choice.implementation, choice.slow) == (DOCUMENTS, None)
        assert ("documents" in choice.describe().split("(")[1]) == isolated
        assert (f"sliding windows of {WINDOW} tokens" in choice.describe()) == (config is GEMMA3)


def test_heads_of_two_widths_are_padded_where_no_kernel_takes_them() -> None:
    config = AutoConfig.for_model("deepseek_v3")
    assert choose(config, BARE).implementation == "sdpa"
    for host in (HOSTS["cpu"], HOSTS["mps"]):
        choice = choose(config, host)
        assert choice.implementation == DOCUMENTS
        assert "heads of 192 and 128 dimensions padded" in choice.describe()
        assert "keys of 192 and values of 128" in refusal(ResourceError, config, host, "sdpa")


def test_a_sliding_window_that_holds_the_training_window_is_none() -> None:
    assert choose(GEMMA3, HOSTS["cpu"], window_tokens=WINDOW - 1).implementation == "sdpa"
    assert choose(GEMMA3, HOSTS["cpu"], window_tokens=WINDOW).implementation == DOCUMENTS


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (HOPPER, "flash_attention_3"),
        (AMPERE, "flash_attention_2"),
        (BARE, "flex_attention"),
        (ELSEWHERE, "flex_attention"),
        (HOSTS["rocm"], "flex_attention"),
    ],
)
def test_soft_capped_scores_get_a_kernel_that_caps_them(host: AttentionHost, expected: str) -> None:
    for isolated in (False, True):
        assert choose(GEMMA2, host, isolated=isolated).implementation == expected
    assert choose(GEMMA2, host, dtype=torch.float32).implementation == "flex_attention"


@pytest.mark.parametrize(("config", "reason"), [(GEMMA2, "caps its attention scores at 50"), (GPT_OSS, "sinks")])
def test_without_a_kernel_for_the_scores_training_is_refused_unless_slow_is_allowed(
    config: PreTrainedConfig, reason: str
) -> None:
    for host in (HOSTS["cpu"], HOSTS["mps"]):
        text = refusal(ResourceError, config, host, window_tokens=131_072)
        assert reason in text
        assert "256.0 GiB a layer" in text  # 4 heads x 131,072^2 x 4 bytes
        assert "train.allow_slow=true" in text
        choice = choose(config, host, allow_slow=True)
        assert choice.implementation == "eager"
        assert choice.slow is not None


def test_a_soft_cap_is_never_left_out() -> None:
    assert "caps its attention scores" in refusal(UsageError, GEMMA2, BARE, "sdpa", allow_slow=True)
    assert "flash_attention_4" in refusal(UsageError, GEMMA2, HOPPER, "flash_attention_4", allow_slow=True)


def test_sinks_are_never_left_out() -> None:
    assert choose(GPT_OSS, HOPPER).implementation == "flex_attention"
    assert "sinks" in refusal(UsageError, GPT_OSS, HOPPER, "sdpa", allow_slow=True)
    assert refusal(UsageError, GPT_OSS, HOPPER, "flash_attention_2")


def test_chunked_layers_get_flex_attention_or_are_slow() -> None:
    assert choose(LLAMA4, BARE).implementation == "flex_attention"
    assert choose(LLAMA4, BARE, window_tokens=32).implementation == "sdpa"
    assert "a mask of 96 x 96 tokens" in refusal(ResourceError, LLAMA4, HOSTS["cpu"])
    assert choose(LLAMA4, HOSTS["cpu"], allow_slow=True).implementation == "sdpa"


def test_documents_are_not_isolated_where_layers_carry_a_state() -> None:
    assert choose(QWEN3_NEXT, BARE).implementation == "sdpa"
    assert "linear_attention" in refusal(UsageError, QWEN3_NEXT, BARE, isolated=True, allow_slow=True)


def test_models_that_attend_in_both_directions_are_refused() -> None:
    config = config_of("gemma3_text", use_bidirectional_attention=True)
    assert "both directions" in refusal(UnsupportedModelError, config, BARE, allow_slow=True)


@pytest.mark.parametrize(("config", "isolated"), [(LLAMA, True), (GEMMA3, False)])
def test_a_mask_of_all_by_all_is_refused_with_its_size_unless_allowed(config: PreTrainedConfig, isolated: bool) -> None:
    text = refusal(ResourceError, config, BARE, "sdpa", isolated=isolated, window_tokens=131_072)
    assert "16.0 GiB" in text
    assert DOCUMENTS in text
    choice = choose(config, BARE, "sdpa", isolated=isolated, allow_slow=True)
    assert choice.implementation == "sdpa"
    assert choice.slow is not None


@pytest.mark.parametrize(
    ("host", "asked", "changes", "reason"),
    [
        (HOSTS["cpu"], "flash_attention_2", {}, "no kernels for CPU"),
        (HOSTS["mps"], "flex_attention", {}, "no backward pass on MPS"),
        (HOSTS["rocm"], "flash_attention_3", {}, "no kernels for ROCM"),
        (BARE, "flash_attention_2", {}, "not installed (the package flash-attn"),
        (HOPPER, "flash_attention_2", {"dtype": torch.float32}, "not in float32"),
        (AMPERE, "flash_attention_4", {}, "compute capability 9"),
        (AttentionHost("cuda", set(), 9), "flex_attention", {}, "Triton"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason_and_what_would_work(
    host: AttentionHost, asked: str, changes: dict[str, Any], reason: str
) -> None:
    text = refusal(UsageError, LLAMA, host, asked, **changes)
    assert reason in text
    assert "expected auto or sdpa" in text


def test_heads_beyond_flash_attention_are_refused() -> None:
    assert "at most 256" in refusal(UsageError, tiny_config(head_dim=320), HOPPER, "flash_attention_2")


def test_dropout_is_never_left_out() -> None:
    config = tiny_config(attention_dropout=0.1)
    assert choose(config, HOPPER, "flash_attention_2").implementation == "flash_attention_2"
    assert "0.1" in refusal(UsageError, config, HOPPER, "flash_attention_3")
    assert "0.1" in refusal(UsageError, config, HOPPER, "flex_attention")
    assert choose(config, HOPPER).implementation == "sdpa"
    for isolated in (False, True):
        assert "attention_dropout" in refusal(ResourceError, config, HOSTS["cpu"], isolated=isolated)


def test_what_is_asked_of_another_machine_is_taken_to_be_installed_there() -> None:
    assert choose(LLAMA, ELSEWHERE, "flash_attention_2").implementation == "flash_attention_2"
    assert choose(LLAMA, ELSEWHERE).alternatives == ("flex_attention",)


def test_the_alternatives_are_what_else_would_run_here() -> None:
    assert choose(LLAMA, HOPPER).alternatives == ("flash_attention_3", "flash_attention_2", "flex_attention")
    assert choose(LLAMA, HOPPER, "flex_attention").alternatives == ("sdpa", "flash_attention_3", "flash_attention_2")
    assert choose(LLAMA, HOSTS["cpu"]).alternatives == ()


def test_this_machine_is_seen_as_it_is() -> None:
    host = AttentionHost.of(torch.device("cpu"))
    assert (host.kind, host.packages) == ("cpu", frozenset())
