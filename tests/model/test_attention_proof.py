"""Before the first step it is seen which attention runs and what its tokens see; what was not expected is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny_config
from test_windowed import config_of
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctxext.errors import ResourceError, UnsupportedModelError
from ctxext.model.attention import Proving, prove_attention
from ctxext.model.attention_choice import AttentionChoice
from ctxext.model.documents import DOCUMENTS, Documents, documents_attention, documents_mask
from ctxext.model.lora import add_lora
from ctxext.recipe.schema import LoraBlock
from ctxext.train.step import SummedLoss

CPU_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
BOTH_PASSES = [CPU_KERNEL, f"{CPU_KERNEL}_backward"]


def proving(config: PreTrainedConfig, attention: str, isolated: bool = False, **changes: Any) -> Proving:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
    loss = SummedLoss(add_lora(model, LoraBlock(rank=4), seed=0))
    values = {"loss": loss, "backward": Tensor.backward, "vocab_size": 260, "dtype": torch.float32}
    return Proving(**{**values, "device": torch.device("cpu"), "isolated": isolated, **changes})


def prove(config: PreTrainedConfig, attention: str, isolated: bool = False, slow: str | None = None) -> list[str]:
    return prove_attention(AttentionChoice(attention, "as asked", slow), proving(config, attention, isolated))


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(
    "config", [tiny_config(), config_of("gemma3_text"), config_of("mistral"), config_of("mixtral")]
)
def test_documents_run_the_flash_kernel_forward_and_backward(config: PreTrainedConfig, isolated: bool) -> None:
    assert prove(config, DOCUMENTS, isolated) == BOTH_PASSES


def test_plain_causal_attention_runs_the_flash_kernel_forward_and_backward() -> None:
    assert prove(tiny_config(), "sdpa") == BOTH_PASSES


@pytest.mark.parametrize(("config", "isolated"), [(tiny_config(), True), (config_of("gemma3_text"), False)])
def test_a_mask_of_all_by_all_is_seen_although_the_kernel_is_fused(config: PreTrainedConfig, isolated: bool) -> None:
    with pytest.raises(ResourceError, match=r"matrix of all tokens by all tokens.*allow_slow"):
        prove(config, "sdpa", isolated)
    assert prove(config, "sdpa", isolated, slow="allowed") == BOTH_PASSES


def test_eager_attention_is_refused_unless_it_is_to_be_slow() -> None:
    with pytest.raises(ResourceError, match="plain matrix products"):
        prove(tiny_config(), "eager")
    given = proving(tiny_config(), "eager")
    assert prove_attention(AttentionChoice("eager", "as asked"), given, allow_slow=True) == []
    assert prove(config_of("gemma2", final_logit_softcapping=None), "eager", slow="allowed") == []


def registered(name: str, attend: Callable[..., Any], mask: Callable[..., Any] = sdpa_mask) -> str:
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    return name


def test_attention_without_any_known_kernel_is_refused() -> None:
    def running_mean(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> Any:
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (value.cumsum(2) / torch.arange(1, value.shape[2] + 1)[:, None]).transpose(1, 2), None

    with pytest.raises(ResourceError, match="plain matrix products"):
        prove(tiny_config(), registered("running_mean", running_mean))


def test_an_isolation_that_leaks_in_one_layer_is_refused() -> None:
    def leaking(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> Any:
        if isinstance(mask, Documents) and module.layer_idx == 1:
            return sdpa_attention_forward(module, query, key, value, None, **arguments)
        return documents_attention(module, query, key, value, mask, **arguments)

    name = registered("leaking", leaking, documents_mask)
    with pytest.raises(UnsupportedModelError, match="tokens of one document see another one"):
        prove(tiny_config(), name, isolated=True)
    assert prove(tiny_config(), name) == BOTH_PASSES


def test_positions_that_hide_what_is_before_a_jump_are_refused() -> None:
    config = tiny_config()
    given = proving(config, "sdpa")

    class WithoutTheMaskOfOnes(nn.Module):
        def forward(self, **arguments: Any) -> Tensor:
            return given.loss(**{**arguments, "isolated": True})

    with pytest.raises(UnsupportedModelError, match="do not see those before it"):
        prove_attention(AttentionChoice("sdpa", "as asked"), proving(config, "sdpa", loss=WithoutTheMaskOfOnes()))


def test_a_model_in_training_is_proven_with_its_dropout() -> None:
    with pytest.raises(ResourceError, match="matrix of all tokens by all tokens"):  # no kernel has dropout on a CPU
        prove(tiny_config(attention_dropout=0.1), "sdpa")
