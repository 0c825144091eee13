"""Haystacks: whole documents in a seeded order, one order a sample, never repeating inside one.

A haystack of its own for every sample makes samples independent, which the intervals rely on. The one exception is
`noise`, RULER's five sentences over and over: what stands out of it is salient, so it tests saliency, not retrieval.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ctxext.data import words
from ctxext.data.readers.builtin import python_topics
from ctxext.errors import ArtefactError, UsageError, unknown_name
from ctxext.evaluation.grid import Block
from ctxext.files import canonical_json, sha256_bytes, shipped_directory

Encode = Callable[[str], list[int]]

SEPARATOR = "\n\n"
# RULER's noise (NVIDIA/RULER, scripts/data/synthetic/niah.py).
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_TEXT_ENDINGS = (".txt", ".md", ".rst")


class TextFiles(Block):
    """Your own text: files, or folders whose .txt, .md and .rst files are taken in the order of their names."""

    text: Annotated[list[str], Field(min_length=1)]


class HubDataset(Block):
    """A Hugging Face dataset (by hub name, or a local folder of data files); every row is a document.

    Attributes:
        rows: how many rows are read, from the first.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    rows: Annotated[int, Field(ge=1)] = 1000


NamedHaystack = Literal["python-docs", "everyday", "generated-words", "noise"]
HaystackChoice = NamedHaystack | TextFiles | HubDataset


@dataclass(frozen=True)
class Haystack:
    """A named collection of documents.

    Attributes:
        documents: None when they are generated without end.
        sha256: of all documents, or of the generator's word list.
    """

    name: str
    documents: tuple[str, ...] | None
    sha256: str


# Generators of endless haystacks: (seed, number of the document) -> text, and what stands between documents.
_GENERATED: dict[str, tuple[Callable[[str, int], str], str]] = {
    "generated-words": (lambda seed, number: words.document(f"{seed}/{number}"), " "),
    "noise": (lambda seed, number: NOISE, "\n"),
}


def load_haystack(choice: HaystackChoice | str) -> Haystack:
    """The haystack of a name, of text files or of a dataset.

    Raises:
        UsageError: unknown name, or no such column.
        ArtefactError: unreadable files or dataset, or a Python that was installed without its documentation topics.
    """
    if isinstance(choice, TextFiles):
        return _collected("text " + ", ".join(choice.text), _text_documents(choice.text))
    if isinstance(choice, HubDataset):
        return _collected(f"dataset {choice.dataset}", _dataset_documents(choice))
    if choice == "python-docs":
        return _collected(choice, tuple(text for _, text in python_topics()))
    if choice == "everyday":
        return _collected(choice, _everyday_passages())
    if choice == "generated-words":
        return Haystack(choice, None, sha256_bytes(canonical_json(list(words.WORDS)).encode()))
    if choice == "noise":
        return Haystack(choice, None, sha256_bytes(NOISE.encode()))
    raise unknown_name("haystack", choice, ("python-docs", "everyday", "generated-words", "noise"))


def _collected(name: str, documents: tuple[str, ...]) -> Haystack:
    return Haystack(name, documents, sha256_bytes(canonical_json(list(documents)).encode()))


def _everyday_passages() -> tuple[str, ...]:
    text = (shipped_directory("evals") / "haystacks" / "everyday.txt").read_text(encoding="utf-8")
    return tuple(passage.strip() for passage in text.split("\n---\n"))


def _text_documents(names: list[str]) -> tuple[str, ...]:
    documents = []
    for path in _text_paths(names):
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ArtefactError(f"could not read the haystack file ({error})", where=str(path)) from error
        if text:
            documents.append(text)
    if not documents:
        raise ArtefactError("no text in the haystack's files", where=", ".join(names))
    return tuple(documents)


def _text_paths(names: list[str]) -> Iterator[Path]:
    for name in names:
        path = Path(name)
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix in _TEXT_ENDINGS and file.is_file())
        else:
            yield path


def _dataset_documents(choice: HubDataset) -> tuple[str, ...]:
    import datasets  # slow to import, and most suites need none

    where = f"dataset {choice.dataset}"
    try:
        rows: Any = datasets.load_dataset(
            choice.dataset, choice.config, split=choice.split, revision=choice.revision, streaming=True
        )
        columns, documents = set[str](), []
        for row in rows.take(choice.rows):
            columns |= set(row)
            if isinstance(row.get(choice.column), str) and row[choice.column].strip():
                documents.append(row[choice.column].strip())
    except Exception as error:  # the library raises its own, the hub's, pyarrow's and the system's errors
        raise ArtefactError(f"could not read the dataset ({error})", where=where) from error
    if choice.column not in columns:
        raise unknown_name("column", choice.column, columns, where=where)
    if not documents:
        raise ArtefactError(f"no text in column {choice.column}", where=where)
    return tuple(documents)


class HaystackReader:
    """Token ids of seeded document orders; every document is tokenised once.

    Args:
        encode: text to token ids, without special tokens.
    """

    def __init__(self, haystack: Haystack, encode: Encode) -> None:
        self.haystack = haystack
        self._encode = encode
        self._generate, between = _GENERATED.get(haystack.name, _GENERATED["generated-words"])
        self._separator = encode(SEPARATOR if haystack.documents else between)
        self._encoded: dict[int, list[int]] = {}

    def tokens(self, seed: str, num_tokens: int) -> list[int]:
        """The first `num_tokens` ids of the documents in the order that `seed` gives.

        Raises:
            UsageError: all documents together are shorter.
        """
        ids: list[int] = []
        for document in self._ordered(seed):
            if ids:
                ids += self._separator
            ids += document
            if len(ids) >= num_tokens:
                return ids[:num_tokens]
        raise UsageError(
            "the haystack is shorter than the asked length, and ctxext never repeats text inside a prompt",
            where=f"haystack {self.haystack.name}",
            got=len(ids),
            expected=f"at least {num_tokens} tokens",
            hint="Use shorter lengths or another haystack.",
        )

    def _ordered(self, seed: str) -> Iterator[list[int]]:
        if self.haystack.documents is None:
            number = 0
            while True:
                yield self._encode(self._generate(seed, number))
                number += 1
        order = list(range(len(self.haystack.documents)))
        random.Random(seed).shuffle(order)
        for index in order:
            if index not in self._encoded:
                self._encoded[index] = self._encode(self.haystack.documents[index])
            yield self._encoded[index]
