"""Chunks of a prefill: attention joined from two flash kernels is attention, and no mask is made."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from support import tiny_model
from torch import Tensor
from transformers import DynamicCache

from ctxext.model.causal import CHUNKED, lower_right_causal, supports_chunked, using_chunked


def masked(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (5, 5), (2, 3), (1, 40), (7, 90), (64, 65), (33, 700)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 16), (6, 2, 64), (3, 1, 20)])
def test_it_is_attention_with_a_lower_right_mask(
    num_queries: int, num_keys: int, heads: int, kv_heads: int, width: int
) -> None:
    torch.manual_seed(num_keys)
    query = torch.randn(2, heads, num_queries, width) * 3
    key, value = torch.randn(2, kv_heads, num_keys, width), torch.randn(2, kv_heads, num_keys, width)
    for scale in (None, 0.3):
        difference = lower_right_causal(query, key, value, scale) - masked(query, key, value, scale)
        assert float(difference.abs().max()) < 1e-5


def test_scores_far_apart_do_not_overflow() -> None:
    query, key = torch.full((1, 1, 4, 16), 30.0), torch.full((1, 1, 9, 16), 30.0)
    key[:, :, :5] *= -1
    value = torch.randn(1, 1, 9, 16)
    found = lower_right_causal(query, key, value)
    assert torch.isfinite(found).all()
    assert float((found - masked(query, key, value, None)).abs().max()) < 1e-5


def test_a_model_in_chunks_equals_itself_in_one_pass_and_afterwards_runs_as_before() -> None:
    model = tiny_model(initializer_range=0.2)
    assert supports_chunked(model)
    ids = torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(0))
    seen: list[str] = []
    with torch.no_grad():
        whole = model.model(ids, use_cache=False).last_hidden_state
        cache = DynamicCache(config=model.config)
        with using_chunked(model):
            seen.append(model.config._attn_implementation)
            pieces = [model.model(piece, past_key_values=cache).last_hidden_state for piece in ids.split(16, dim=1)]
    assert float((torch.cat(pieces, dim=1) - whole).abs().max()) < 1e-5
    assert (seen, model.config._attn_implementation) == ([CHUNKED], "sdpa")


def test_models_that_attend_otherwise_are_left_alone() -> None:
    eager = tiny_model()
    eager.config._attn_implementation = "eager"
    assert not supports_chunked(eager)
