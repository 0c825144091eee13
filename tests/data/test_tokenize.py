"""Documents become one stream: shares as asked, starts where documents begin, ids in the smallest type that fits."""

from __future__ import annotations

import itertools
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support import EOS, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from ctxext.data.bad_rows import BadRows
from ctxext.data.boundaries import SentenceEnds, encode_plain
from ctxext.data.documents import Message, TextDocument
from ctxext.data.tokenize import (
    Encoder,
    TokenDocument,
    TokenStream,
    collect_tokens,
    id_type,
    stream_of,
    tokenizer_fingerprint,
)
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
    bounds = [*stream.document_starts, len(stream.flat)]
    return [tokenizer().decode(stream.flat[a:b].tolist()) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [
        (256, np.uint8),
        (257, np.uint16),
        (65_536, np.uint16),
        (65_537, np.uint32),
        (128_256, np.uint32),
        (1 << 20, np.uint32),
    ],
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
    assert stream.flat.dtype == np.uint16


def test_sources_give_their_shares(tmp_path: Path) -> None:
    weighted = [SourceBlock(kind="generated-words", weight=3.0), SourceBlock(kind="generated-words", weight=1.0)]
    stream = collect_tokens(tokenizer(), weighted, 40_000, seed=0)
    assert len(stream.flat) == sum(stream.tokens_by_source)
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
    def hashed(ids: list[int], dtype: type) -> str:
        return stream_of([TokenDocument(np.array(ids, dtype=dtype), None, "made")]).sha256

    assert hashed([1, 2, 3], np.uint16) == hashed([1, 2, 3], np.uint32)
    assert hashed([3, 2, 1], np.uint16) != hashed([1, 2, 3], np.uint16)


def test_documents_are_found_by_number(tmp_path: Path) -> None:
    stream = collect_tokens(tokenizer(), [files(tmp_path, "one.", "second.", "third one.")], 10_000, seed=0)
    assert stream.lengths.sum() == len(stream.flat)
    for number, text in enumerate(documents_of(stream)):
        assert tokenizer().decode(stream.ids(number).tolist()) == text
        assert stream.learned(number) is None
        assert stream.origin(number).endswith(".txt") or "txt" in stream.origin(number)


def test_batches_give_what_single_texts_give() -> None:
    rng = random.Random(0)
    texts = ["", " ", "\n\n", "ä🙂", *("".join(rng.choices("ab .\n", k=rng.randint(0, 40))) for _ in range(1500))]
    documents = [(number, TextDocument(str(number), text)) for number, text in enumerate(texts)]
    read = [pair for batch in Encoder(tokenizer()).batches(iter(documents), BadRows()) for pair in batch.documents]
    assert [mark for mark, _ in read] == list(range(len(texts)))
    for (_, document), text in zip(read, texts, strict=True):
        assert document.ids.tolist() == [*encode_plain(tokenizer(), text), tokenizer().eos_token_id]


def test_a_vocabulary_with_holes_gets_a_type_that_holds_its_highest_id() -> None:
    class WithHoles:
        eos_token_id = 70_000

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "end": 70_000}

        def __len__(self) -> int:
            return 2

    assert Encoder(WithHoles()).dtype is np.uint32


def test_only_what_the_assistant_says_is_learned() -> None:
    chat = byte_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = (Message("user", "how many?"), Message("assistant", "three."), Message("user", "sure?"))
    (document,) = Encoder(chat).encode([TextDocument("chat", "", messages)], BadRows())
    assert document is not None
    assert document.learned is not None
    learned = [token for token, kept in zip(document.ids.tolist(), document.learned, strict=True) if kept]
    assert chat.decode(learned).strip() == "three."
    assert document.ids[-1] == chat.eos_token_id
    assert not document.learned[-1]


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    document = TextDocument("made", "", ids=np.array([1, 300], dtype=np.uint16))
    with pytest.raises(ArtefactError, match="300"):
        Encoder(tokenizer()).encode([document], BadRows())


def test_tokenizers_that_give_other_ids_have_other_fingerprints() -> None:
    plain, other_end, template = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    other_end.eos_token = "a"
    template.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(plain) == tokenizer_fingerprint(byte_tokenizer())
    assert len({tokenizer_fingerprint(each) for each in (plain, other_end, template)}) == 3


def test_sources_without_any_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no usable document"):
        collect_tokens(tokenizer(), [files(tmp_path, "  \n")], 100, seed=0)


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    collect_tokens(tokenizer(), [GENERATED], 5_000, seed=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] >= seen[-1][1] >= 5_000


def test_insertion_places_lie_behind_sentences() -> None:
    text = "One. Two words! Three\nfour five"
    ids = tokenizer()(text, add_special_tokens=False).input_ids
    ends = SentenceEnds(tokenizer())
    places = {ends.nearest(ids, wanted) for wanted in range(len(ids) + 1)}
    assert places == {0, 4, 15, 22, len(text)}
    assert all(ends.nearest(ids, place) == place for place in places)
