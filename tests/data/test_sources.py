"""Training text comes in a reproducible order and never from the evaluation's haystack."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ctxext.data.readers.builtin import stdlib_files
from ctxext.data.sources import TextDocument, iter_documents
from ctxext.errors import ArtefactError
from ctxext.evaluation.haystack import load_haystack
from ctxext.recipe.data import SourceBlock

STDLIB = SourceBlock(kind="python-stdlib")
GENERATED = SourceBlock(kind="generated-words")
SHINGLE_WORDS = 50
NUM_SAMPLED = 150


def first(source: SourceBlock, seed: int, count: int) -> list[TextDocument]:
    return list(itertools.islice(iter_documents(source, seed), count))


def shingles(text: str) -> Iterator[int]:
    words = re.findall(r"\w+", text.lower())
    for at in range(len(words) - SHINGLE_WORDS + 1):
        yield hash(tuple(words[at : at + SHINGLE_WORDS]))


@cache
def topic_shingles() -> frozenset[int]:
    topics = load_haystack("python-docs").documents
    assert topics is not None
    return frozenset(itertools.chain.from_iterable(shingles(topic) for topic in topics))


def test_the_standard_library_comes_without_haystack_and_tests() -> None:
    parts = {part for path in stdlib_files() for part in path.parts}
    assert not parts & {"pydoc_data", "test", "tests", "idle_test", "site-packages", "lib2to3", "ensurepip"}
    assert len(stdlib_files()) > 300


def test_training_text_shares_no_fifty_words_with_the_haystack() -> None:
    sampled = first(STDLIB, 0, NUM_SAMPLED)
    seen = [shingle for document in sampled for shingle in shingles(document.text)]
    shared = [shingle for shingle in seen if shingle in topic_shingles()]
    print(f"{len(shared)} of {len(seen)} runs of {SHINGLE_WORDS} words in {NUM_SAMPLED} documents are in the haystack")
    assert len(seen) > 50_000
    assert len(topic_shingles()) > 40_000
    assert not shared


def test_the_shingles_would_notice_a_haystack_topic() -> None:
    topics = load_haystack("python-docs").documents
    assert topics is not None
    longest = max(topics, key=len)
    smuggled = f"def f():\n    '''{longest[2000:4000]}'''\n"
    assert sum(shingle in topic_shingles() for shingle in shingles(smuggled)) > 100


def test_origins_name_no_folder_of_this_machine() -> None:
    for document in first(STDLIB, 0, 40):
        assert not Path(document.origin).is_absolute()
        assert document.text.strip()


@pytest.mark.parametrize("source", [STDLIB, GENERATED], ids=lambda source: source.kind)
def test_the_order_depends_on_the_seed_alone(source: SourceBlock) -> None:
    drawn = first(source, 3, 8)
    assert first(source, 3, 8) == drawn
    assert first(source, 4, 8) != drawn


def test_generated_documents_do_not_repeat() -> None:
    texts = [document.text for document in first(GENERATED, 0, 500)]
    assert len(set(texts)) == 500


def test_files_are_read_once_in_a_seeded_order(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "folder.txt").mkdir()
    source = SourceBlock(kind="text", paths=[str(tmp_path / "*.txt"), str(tmp_path / "1*.txt")])
    texts = [document.text for document in iter_documents(source, 0)]
    assert sorted(texts) == sorted(f"text {number}" for number in range(12))
    assert texts != [document.text for document in iter_documents(source, 1)]


def test_a_pattern_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no file matches"):
        first(SourceBlock(kind="text", paths=[str(tmp_path / "*.txt")]), 0, 1)


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ArtefactError, match=r"latin\.txt"):
        first(SourceBlock(kind="text", paths=[str(tmp_path / "latin.txt")]), 0, 1)
