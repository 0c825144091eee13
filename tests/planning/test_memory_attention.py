"""A traced step has the memory of the attention that trains: documents and windows without a mask, caps included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import make_job
from test_memory import measured_step, small_config, traced
from transformers import AutoConfig, PreTrainedConfig

from ctxext.data.packing import PackedWindow
from ctxext.model.documents import DOCUMENTS
from ctxext.model.savings import Savings
from ctxext.planning.memory import StepMemory
from ctxext.planning.memory_plan import plan_memory
from ctxext.train.step import SummedLoss

TOKENS = 768
SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 128,
    "pad_token_id": 0,
}
GEMMA3 = AutoConfig.for_model("gemma3_text", **SHAPE, layer_types=["sliding_attention", "full_attention"] * 2)
GEMMA2 = AutoConfig.for_model("gemma2", **SHAPE, final_logit_softcapping=None)


def documents(length: int) -> PackedWindow:
    positions = [place % 250 for place in range(length)]
    return PackedWindow([place % 97 for place in range(length)], positions, [0], 0)


def trace(config: PreTrainedConfig, attention: str, **changes: Any) -> StepMemory:
    return traced(config, Savings(1), **{"window_tokens": TOKENS, "attention": attention, **changes})


@pytest.mark.parametrize("config", [small_config(), GEMMA3], ids=["llama", "gemma3"])
def test_the_traced_peak_of_isolated_documents_is_the_measured_one(config: PreTrainedConfig) -> None:
    memory = trace(config, DOCUMENTS)
    assert memory.peak_bytes == pytest.approx(measured_step(config, Savings(1), DOCUMENTS, documents(TOKENS)), rel=0.1)


def test_nothing_in_it_grows_with_the_square_of_the_length() -> None:
    for config, attention in ((small_config(), DOCUMENTS), (GEMMA3, DOCUMENTS), (GEMMA2, "flex_attention")):
        half, whole = (
            trace(config, attention, device="cuda", dtype=torch.bfloat16, window_tokens=tokens).peak_bytes
            for tokens in (8192, 16384)
        )
        assert whole < 2.1 * half


def test_on_a_gpu_documents_take_what_one_fused_kernel_takes() -> None:
    assert trace(GEMMA3, DOCUMENTS, device="cuda") == trace(GEMMA3, "flash_attention_2", device="cuda")
    assert trace(GEMMA3, DOCUMENTS, device="cuda") != trace(GEMMA3, DOCUMENTS, device="cpu")


def test_what_is_slow_is_counted() -> None:
    scores = GEMMA2.num_attention_heads * TOKENS * TOKENS * 4
    assert trace(GEMMA2, "eager").peak_bytes - trace(GEMMA2, "flex_attention").peak_bytes > scores


def test_a_recipe_with_isolated_documents_is_traced_as_it_trains(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    changes = ("data.windows.mode=full-length", "data.windows.length=null", "target_length=32768")
    plain, isolated = (
        plan_memory(job.recipe(*changes, f"data.windows.positions={positions}"), SummedLoss)
        for positions in ("consecutive", "per-document")
    )
    assert plain.traced is not None
    assert isolated.traced is not None
    assert isolated.traced["peak_bytes"] == pytest.approx(plain.traced["peak_bytes"], rel=0.02)
