"""What tokens of a window see, on every attention that runs here: all before them across gaps of positions, and nothing
of other documents where documents are isolated."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from test_influence import model_with_lora, watched
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from ctxext.model.documents import DOCUMENTS
from ctxext.train.step import SummedLoss

LENGTH, FIRST, SECOND = 48, 18, 33
CHUNKS = (slice(0, FIRST), slice(FIRST, SECOND), slice(SECOND, LENGTH))
IDS = torch.arange(5, 5 + LENGTH)[None]
RESTARTING = torch.cat([torch.arange(FIRST), torch.arange(SECOND - FIRST), torch.arange(LENGTH - SECOND)])[None]
SKIP_WISE = torch.cat([torch.arange(FIRST), torch.arange(FIRST, SECOND) + 90, torch.arange(SECOND, LENGTH) + 400])[None]

every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", DOCUMENTS])


def seen_by_last(attention: str, positions: Tensor, isolated: bool) -> Tensor:
    """[chunks] how far the last hidden state moves when a chunk's embeddings change, in a pass as training makes it.

    By changing and not by gradients: flex attention has no backward pass on CPU.
    """
    model = model_with_lora(attention)
    noise = torch.randn(1, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    last = []
    for chunk in (None, *CHUNKS):
        change = torch.zeros_like(noise)
        if chunk is not None:
            change[:, chunk] = noise[:, chunk]
        with watched(model, change) as seen, torch.no_grad():
            SummedLoss(model)(IDS, positions, isolated=isolated)
        last.append(seen.hidden[0][0, -1])
    return torch.stack([(state - last[0]).abs().max() for state in last[1:]])


@every_attention
def test_every_chunk_sees_all_chunks_before_it(attention: str) -> None:
    assert (seen_by_last(attention, SKIP_WISE, isolated=False) > 1e-2).all()


@every_attention
def test_isolated_documents_see_themselves_alone(attention: str) -> None:
    first, second, own = seen_by_last(attention, RESTARTING, isolated=True)
    assert first == second == 0
    assert own > 1e-2


@every_attention
def test_an_isolated_document_counts_as_it_does_alone(attention: str) -> None:
    model = model_with_lora(attention)
    learned = torch.ones_like(IDS, dtype=torch.bool)
    learned[0, [FIRST, SECOND]] = False
    with torch.no_grad():
        together = SummedLoss(model)(IDS, RESTARTING, learned, True)
        alone = sum(
            SummedLoss(model)(IDS[:, begin:end], torch.arange(end - begin)[None])
            for begin, end in ((0, FIRST), (FIRST, SECOND), (SECOND, LENGTH))
        )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_what_is_not_learned_adds_nothing_to_the_loss() -> None:
    model = model_with_lora("sdpa")
    learned = torch.zeros_like(IDS, dtype=torch.bool)
    learned[0, 20:30] = True
    positions = torch.arange(LENGTH)[None]
    with torch.no_grad():
        some, others = (SummedLoss(model)(IDS, positions, mask) for mask in (learned, ~learned))
        both = SummedLoss(model)(IDS, positions)
    assert 0 < float(some) < float(both)
    torch.testing.assert_close(some + others, both)


def by_lengths(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **arguments: Any) -> Any:
    """As flash-attn's functions: causal, documents by the cumulative lengths, rows of a batch without any."""
    lengths = arguments.get("cu_seq_lens_q")
    places = [0, *([LENGTH, 2 * LENGTH] if lengths is None else lengths.tolist()[1:])]
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    longest = max(end - begin for begin, end in pairwise(places))
    assert arguments.get("max_length_q", LENGTH) == longest
    parts = [
        F.scaled_dot_product_attention(
            *(tensor[begin:end].transpose(0, 1) for tensor in flat),
            is_causal=True,
            scale=arguments["scaling"],
            enable_gqa=True,
        )
        for begin, end in pairwise(places)
    ]
    return torch.cat(parts, dim=1).transpose(0, 1).unflatten(0, (2, LENGTH)), None


@pytest.mark.parametrize("isolated", [False, True])
def test_flash_attention_gets_the_documents_of_a_batch_as_lengths(isolated: bool) -> None:
    AttentionInterface.register("flash_attention_by_lengths", by_lengths)
    AttentionMaskInterface.register("flash_attention_by_lengths", flash_attention_mask)
    ids = torch.cat([IDS, IDS.flip(1)])
    positions = torch.cat([RESTARTING, torch.arange(LENGTH)[None]])
    model = model_with_lora("eager")
    with torch.no_grad():
        expected = SummedLoss(model)(ids, positions, isolated=isolated)
        # Set afterwards: transformers looks for the package of what a model is built with.
        model.get_base_model().config._attn_implementation = "flash_attention_by_lengths"
        found = SummedLoss(model)(ids, positions, isolated=isolated)
    torch.testing.assert_close(found, expected)
