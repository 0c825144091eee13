"""What tokens of a window see, on every attention that runs here: all before them across gaps of positions, and nothing
of other documents where documents are isolated."""

from __future__ import annotations

import pytest
import torch
from test_influence import model_with_lora, watched
from torch import Tensor

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
