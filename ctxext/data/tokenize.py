"""Documents to one stream of token ids, with the documents' starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ctxext.data.boundaries import encode_plain
from ctxext.data.sources import iter_documents
from ctxext.errors import ArtefactError
from ctxext.files import sha256_bytes
from ctxext.recipe.data import SourceBlock

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenStream:
    """Concatenated documents.

    Attributes:
        ids: [N], the smallest unsigned type that holds the vocabulary.
        document_starts: ascending indices into `ids`.
        tokens_by_source: kept tokens of each source, in the recipe's order.
    """

    ids: npt.NDArray[np.unsignedinteger[Any]]
    document_starts: npt.NDArray[np.int64]
    tokens_by_source: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Identifies the stream's content."""
        return sha256_bytes(self.ids.astype("<u4").tobytes())


def id_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """uint16 when every id below `vocab_size` fits, else uint32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def collect_tokens(
    tokenizer: Any, sources: list[SourceBlock], num_tokens: int, seed: int, progress: Progress | None = None
) -> TokenStream:
    """Read each source until it has given its share of `num_tokens`; documents are separated by the EOS token.

    A source that ends early gives what it has; training then repeats its windows in another order.

    Raises:
        ArtefactError: the sources hold no text at all.
    """
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else encode_plain(tokenizer, "\n\n")
    total_weight = sum(source.weight for source in sources)
    documents: list[list[int]] = []
    by_source: list[int] = []
    for number, source in enumerate(sources):
        wanted = int(num_tokens * source.weight / total_weight) + 1
        gathered = 0
        for document in iter_documents(source, seed + number):
            ids = [*encode_plain(tokenizer, document.text), *separator]
            documents.append(ids[: wanted - gathered])
            gathered += len(documents[-1])
            if progress is not None:
                progress(sum(by_source) + gathered, num_tokens)
            if gathered >= wanted:
                break
        by_source.append(gathered)
    if not sum(by_source):
        raise ArtefactError("the sources hold no text", where="data.sources")
    interleaved = np.random.default_rng([seed, 1]).permutation(len(documents))
    starts: list[int] = []
    flat: list[int] = []
    for index in interleaved:
        starts.append(len(flat))
        flat += documents[index]
    return TokenStream(
        ids=np.asarray(flat, dtype=id_type(len(tokenizer))),
        document_starts=np.asarray(starts, dtype=np.int64),
        tokens_by_source=tuple(by_source),
    )
