"""What is recorded are the weights that plain attention computes, and the model runs on as if nobody looked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import tiny_model
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from ctxext.model.attention_record import AttentionRecord, recording

LENGTH, ROWS, DISTANCES = 48, [20, 33, 47], [8, 100]


def record(positions: Tensor | None = None) -> AttentionRecord:
    return AttentionRecord(torch.arange(LENGTH) if positions is None else positions, ROWS, DISTANCES)


def other_model(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    values = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.5,
        **changes,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).eval()


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(0, 250, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


def plain_weights(model: Any, **arguments: Any) -> list[Tensor]:
    """[H, S, S] of every layer for the first row of the batch, from attention that shows them."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(tokens(), use_cache=False, output_attentions=True, **arguments)
    return [weights[0] for weights in out.attentions]


def assert_same(found: AttentionRecord, expected: list[Tensor], positions: Tensor) -> None:
    assert sorted(found.layers) == list(range(len(expected)))
    assert found.unknown == {}
    apart = positions[:, None] - positions[None]
    for layer, weights in enumerate(expected):
        rows = weights[:, ROWS].double()
        bits = torch.special.entr(rows).sum(-1).mean(1) / math.log(2)
        torch.testing.assert_close(found.layers[layer].entropy.double(), bits, atol=1e-4, rtol=1e-4)
        far = torch.where(apart[ROWS] > DISTANCES[0], rows, 0.0).sum(-1).mean(1)
        torch.testing.assert_close(found.layers[layer].far[:, 0].double(), far, atol=1e-5, rtol=1e-4)
        assert bool(found.layers[layer].far[:, 1].isnan().all()), "no key is 100 positions away"


def test_the_recorded_rows_are_those_of_plain_attention() -> None:
    model = tiny_model(initializer_range=0.5)
    found = record()
    with torch.no_grad(), recording(found):
        model(tokens(), use_cache=False)
    assert_same(found, plain_weights(model), torch.arange(LENGTH))
    uniform = sum(math.log2(row + 1) for row in ROWS) / len(ROWS)
    assert found.layers[0].uniform_bits == pytest.approx(uniform, abs=1e-4)


def test_sliding_layers_see_their_window_only() -> None:
    model = other_model("mistral", sliding_window=12)
    found = record()
    with torch.no_grad(), recording(found):
        model(tokens(), use_cache=False)
    assert_same(found, plain_weights(model), torch.arange(LENGTH))
    assert found.layers[0].uniform_bits == pytest.approx(math.log2(12), abs=1e-4)
    # A kernel with a window of its own gets no mask.
    found = record()
    query = torch.randn(1, 2, LENGTH, 8)
    with recording(found):
        ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Identity(), query, query, query, None, sliding_window=12)
    assert found.layers[0].uniform_bits == pytest.approx(math.log2(12), abs=1e-4)


def test_soft_capped_scores_and_their_own_scale_are_followed() -> None:
    model = other_model("gemma2", attn_logit_softcapping=2.0, query_pre_attn_scalar=5, sliding_window=64)
    expected = plain_weights(model)
    AttentionInterface.register("plain_gemma2", eager_attention_forward)
    AttentionMaskInterface.register("plain_gemma2", eager_mask)
    model.set_attn_implementation("plain_gemma2")
    found = record()
    with torch.no_grad(), recording(found):
        model(tokens(), use_cache=False)
    assert_same(found, expected, torch.arange(LENGTH))


def test_what_a_block_mask_hides_is_hidden() -> None:
    document = torch.tensor([0] * 30 + [1] * 18)

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (document[row] == document[column])

    mask = create_block_mask(visible, 1, 1, LENGTH, LENGTH, device="cpu")
    query, key = (torch.randn(1, heads, LENGTH, 8) for heads in (4, 2))
    found = record()
    with recording(found):
        wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with pytest.raises(Exception, match="mask"):  # the kernel of this name cannot take such a mask
            wrapped(torch.nn.Identity(), query, key, key, mask)
    expected = (math.log2(21) + math.log2(4) + math.log2(18)) / 3
    assert found.layers[0].uniform_bits == pytest.approx(expected, abs=1e-4)


def test_distance_is_counted_in_positions() -> None:
    model = tiny_model(initializer_range=0.5)
    positions = torch.cat([torch.arange(24), torch.arange(500, 524)])
    found = record(positions)
    with torch.no_grad(), recording(found):
        ids = tokens()
        model(ids, position_ids=positions.expand(2, -1), attention_mask=torch.ones_like(ids), use_cache=False)
    weights = plain_weights(
        model, position_ids=positions.expand(2, -1), attention_mask=torch.ones(2, LENGTH, dtype=torch.long)
    )
    far = weights[0][:, [33, 47], :24].sum(-1).mean(1)  # row 20 lies before the jump and can see none of it
    torch.testing.assert_close(found.layers[0].far[:, 1], far, atol=1e-5, rtol=1e-4)


def test_documents_that_are_kept_apart_do_not_see_each_other() -> None:
    model = tiny_model(initializer_range=0.5)
    positions = torch.cat([torch.arange(30), torch.arange(18)])
    found = record(positions)
    with torch.no_grad(), recording(found):
        model(tokens(), position_ids=positions.expand(2, -1), use_cache=False)
    weights = plain_weights(model, position_ids=positions.expand(2, -1))
    bits = torch.special.entr(weights[1][:, ROWS]).sum(-1).mean(1) / math.log(2)
    torch.testing.assert_close(found.layers[1].entropy, bits, atol=1e-4, rtol=1e-4)
    assert float(weights[1][:, 47, :30].max()) == 0.0


def test_whoever_is_looked_at_computes_the_same_bits_and_gradients() -> None:
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    results = []
    for look in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        found = record()
        if look:
            with recording(found):
                loss = model(tokens(), labels=tokens(), use_cache=False).loss
                loss.backward()  # what checkpoints compute again passes the recorder too
        else:
            loss = model(tokens(), labels=tokens(), use_cache=False).loss
            loss.backward()
        results.append([loss.detach(), torch.rand(3), *(parameter.grad for parameter in model.parameters())])
    assert len(found.layers) == 2
    assert len(results[0]) == 2 + len(list(model.parameters()))
    for plain, watched in zip(*results, strict=True):
        assert torch.equal(plain, watched)


def test_only_the_first_pass_is_recorded_and_nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(initializer_range=0.5)
    local = {"ctxext_test": ALL_ATTENTION_FUNCTIONS["sdpa"]}
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", local)
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    assert "ctxext_test" in functions
    found = record()
    with torch.no_grad(), recording(found):
        model(tokens(), use_cache=False)
        first = {layer: look.entropy.clone() for layer, look in found.layers.items()}
        model(tokens().flip(1), use_cache=False)
    assert all(torch.equal(found.layers[layer].entropy, entropy) for layer, entropy in first.items())
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    with pytest.raises(RuntimeError, match="on purpose"), recording(record()):
        raise RuntimeError("on purpose")
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions


def test_a_layer_whose_weights_cannot_be_told_is_named() -> None:
    model = tiny_model()
    found = AttentionRecord(torch.arange(LENGTH), ROWS, DISTANCES)
    with torch.no_grad(), recording(found):
        model(tokens()[:, :30], use_cache=False)
    assert found.layers == {}
    assert found.unknown == dict.fromkeys((0, 1), "it has 30 queries and 30 keys, the window 48")


def test_cumulative_lengths_keep_documents_apart_and_sinks_take_their_share() -> None:
    query, key = (torch.randn(1, heads, LENGTH, 8, generator=torch.Generator().manual_seed(1)) for heads in (4, 2))
    sinks = torch.tensor([-9.0, 0.0, 1.0, 9.0])
    found = record()
    starts = torch.tensor([0, 30, LENGTH], dtype=torch.int32)
    layer = torch.nn.Identity()
    layer.num_key_value_groups = 2
    with recording(found):
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        attend(layer, query, key, key, None, s_aux=sinks, cu_seq_lens_q=starts)
    keys = key[0].repeat_interleave(2, 0)
    bits = torch.zeros(4, len(ROWS))
    for number, (row, first) in enumerate(zip(ROWS, (0, 30, 30), strict=True)):
        scores = (query[0, :, row, None] @ keys[:, first : row + 1].transpose(1, 2))[:, 0] / math.sqrt(8)
        bits[:, number] = torch.special.entr(torch.cat([scores, sinks[:, None]], 1).softmax(1)).sum(1) / math.log(2)
    torch.testing.assert_close(found.layers[0].entropy, bits.mean(1), atol=1e-4, rtol=1e-4)
