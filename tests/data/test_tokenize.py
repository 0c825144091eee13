"""Documents become one stream: shares as asked, starts where documents begin, ids in the smallest type that fits."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support import EOS, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from ctxext.data.boundaries import SentenceEnds
from ctxext.data.tokenize import TokenStream, collect_tokens, id_type
from ctxext.errors import ArtefactError
from ctxext.recipe.data import SourceBlock

GENERATED = SourceBlock(kind="generated-words")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def files(folder: Path, *texts: str) -> SourceBlock:
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return SourceBlock(kind="text", paths=[str(folder / "*.txt")])


def documents_of(stream: TokenStream) -> list[str]:
    bounds = [*stream.document_starts, len(stream.ids)]
    return [tokenizer().decode(stream.ids[a:b].tolist()) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [(1, np.uint16), (65_535, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (1 << 20, np.uint32)],
)
def test_ids_get_the_smallest_type_that_holds_the_vocabulary(vocab_size: int, expected: type) -> None:
    kind = id_type(vocab_size)
    assert kind is expected
    assert int(kind(vocab_size - 1)) == vocab_size - 1


def test_every_document_stands_whole_between_starts(tmp_path: Path) -> None:
    texts = ["first text.", "second, longer text.\n", "third: äöü 中文 🙂"]
    stream = collect_tokens(tokenizer(), [files(tmp_path, *texts)], 10_000, seed=0)
    assert sorted(documents_of(stream)) == sorted(text + EOS for text in texts)
    assert stream.document_starts[0] == 0
    assert stream.ids.dtype == np.uint16


def test_sources_give_their_shares(tmp_path: Path) -> None:
    weighted = [SourceBlock(kind="generated-words", weight=3.0), SourceBlock(kind="generated-words", weight=1.0)]
    stream = collect_tokens(tokenizer(), weighted, 40_000, seed=0)
    assert len(stream.ids) == sum(stream.tokens_by_source)
    assert stream.tokens_by_source == (30_001, 10_001)


def test_two_equal_sources_give_different_documents() -> None:
    documents = documents_of(collect_tokens(tokenizer(), [GENERATED, GENERATED], 20_000, seed=0))
    assert len(set(documents)) == len(documents)


def test_a_source_that_ends_early_gives_what_it_has(tmp_path: Path) -> None:
    stream = collect_tokens(tokenizer(), [files(tmp_path, "short"), GENERATED], 4_000, seed=0)
    assert stream.tokens_by_source == (len("short") + 1, 2_001)


def test_the_stream_is_a_pure_function_of_its_arguments(tmp_path: Path) -> None:
    sources = [files(tmp_path, *(f"text number {number}." for number in range(20))), GENERATED]
    first, again = (collect_tokens(tokenizer(), sources, 3_000, seed=7) for _ in range(2))
    other = collect_tokens(tokenizer(), sources, 3_000, seed=8)
    assert first.sha256 == again.sha256
    np.testing.assert_array_equal(first.document_starts, again.document_starts)
    assert other.sha256 != first.sha256


def test_the_hash_depends_on_the_ids_and_not_on_their_type() -> None:
    ids = np.array([1, 2, 3], dtype=np.uint16)
    starts = np.array([0])
    same = TokenStream(ids.astype(np.uint32), starts, (3,))
    assert TokenStream(ids, starts, (3,)).sha256 == same.sha256
    assert TokenStream(ids[::-1].copy(), starts, (3,)).sha256 != same.sha256


def test_sources_without_any_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="hold no text"):
        collect_tokens(tokenizer(), [files(tmp_path, "  \n")], 100, seed=0)


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    collect_tokens(tokenizer(), [GENERATED], 5_000, seed=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] >= seen[-1][1] == 5_000


def test_insertion_places_lie_behind_sentences() -> None:
    text = "One. Two words! Three\nfour five"
    ids = tokenizer()(text, add_special_tokens=False).input_ids
    ends = SentenceEnds(tokenizer())
    places = {ends.nearest(ids, wanted) for wanted in range(len(ids) + 1)}
    assert places == {0, 4, 15, 22, len(text)}
    assert all(ends.nearest(ids, place) == place for place in places)
