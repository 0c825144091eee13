"""On a CUDA device: isolated documents, sliding windows and soft caps run fused kernels and compute what eager does.

    python -m pytest tests/gpu/test_attention.py

Minutes on any device from Ampere on; skipped where there is none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ctxext.model.attention import Proving, prove_attention
from ctxext.model.attention_choice import AttentionHost, choose_attention
from ctxext.model.documents import DOCUMENTS
from ctxext.model.lora import add_lora
from ctxext.planning.attention_gain import eager_comparison
from ctxext.recipe.schema import LoraBlock
from ctxext.train.step import SummedLoss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": SLIDING,
    "mistral": {"sliding_window": 256},
    "gemma2": {**SLIDING, "attn_logit_softcapping": 50.0},
}
every_family = pytest.mark.parametrize("name", FAMILIES)
both = pytest.mark.parametrize("isolated", [False, True])


def config_of(name: str) -> PreTrainedConfig:
    return AutoConfig.for_model(name, **SHAPE, **FAMILIES[name])


@both
@every_family
def test_the_choice_equals_eager_attention_and_gains(name: str, isolated: bool) -> None:
    device = torch.device("cuda")
    values: dict[str, Any] = {"window_tokens": 4096, "isolated": isolated}
    choice = choose_attention(config_of(name), AttentionHost.of(device), torch.bfloat16, **values)
    gain = eager_comparison(config_of(name), device, torch.bfloat16, choice, **values)
    print(gain.describe(), gain.others)
    assert gain.memory_ratio > 4
    assert gain.speedup > 1


@both
@every_family
def test_a_fused_kernel_runs_and_documents_stay_apart(name: str, isolated: bool) -> None:
    device, config = torch.device("cuda"), config_of(name)
    host = AttentionHost.of(device)
    choice = choose_attention(config, host, torch.bfloat16, window_tokens=4096, isolated=isolated)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation=choice.implementation
    ).to(device)
    loss = SummedLoss(add_lora(model, LoraBlock(rank=4), seed=0))
    proving = Proving(loss, Tensor.backward, config.vocab_size, torch.bfloat16, device, isolated)
    kernels = prove_attention(choice, proving)
    print(choice.describe(), kernels)
    if choice.implementation == DOCUMENTS and isolated:
        assert "_varlen_attn" in kernels
        assert "_varlen_attn_backward" in kernels
