"""Haystacks: whole documents in a seeded order, one order a sample, never repeating inside one.

A haystack of its own for every sample makes samples independent, which the intervals rely on.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ctxext.data import words
from ctxext.errors import ArtefactError, UsageError, unknown_name
from ctxext.files import canonical_json, sha256_bytes

Encode = Callable[[str], list[int]]

SEPARATOR = "\n\n"


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


def load_haystack(name: str) -> Haystack:
    """The haystack `name`.

    Raises:
        UsageError: unknown name.
        ArtefactError: this Python was installed without its documentation topics.
    """
    if name == "python-docs":
        documents = _python_topics()
        return Haystack(name, documents, sha256_bytes(canonical_json(list(documents)).encode()))
    if name == "generated-words":
        return Haystack(name, None, sha256_bytes(canonical_json(list(words.WORDS)).encode()))
    raise unknown_name("haystack", name, ("python-docs", "generated-words"))


def _python_topics() -> tuple[str, ...]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ArtefactError(
            "this Python has no documentation topics (module pydoc_data.topics)",
            where="haystack python-docs",
            hint="Install the full standard library or choose another haystack.",
        ) from error
    return tuple(topics[name].strip() for name in sorted(topics))


class HaystackReader:
    """Token ids of seeded document orders; every document is tokenised once.

    Args:
        encode: text to token ids, without special tokens.
    """

    def __init__(self, haystack: Haystack, encode: Encode) -> None:
        self.haystack = haystack
        self._encode = encode
        self._separator = encode(SEPARATOR) if haystack.documents else encode(" ")
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
                yield self._encode(words.document(f"{seed}/{number}"))
                number += 1
        order = list(range(len(self.haystack.documents)))
        random.Random(seed).shuffle(order)
        for index in order:
            if index not in self._encoded:
                self._encoded[index] = self._encode(self.haystack.documents[index])
            yield self._encoded[index]
