"""Documents to token ids, many at once, and where tokenised documents are found again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ctxext.data.bad_rows import BadRows
from ctxext.data.boundaries import encode_plain
from ctxext.data.chat import ConversationError, render_chat
from ctxext.data.demand import Demand, wanted_tokens
from ctxext.data.documents import Message, TextDocument
from ctxext.data.readers.token_arrays import check_ids
from ctxext.data.sources import iter_documents
from ctxext.errors import ArtefactError
from ctxext.files import fingerprint, sha256_bytes
from ctxext.recipe.data import SourceBlock

Mark = TypeVar("Mark")
Progress = Callable[[int, int], None]
Ids = npt.NDArray[np.unsignedinteger[Any]]
Mask = npt.NDArray[np.bool_]

# One call of the tokenizer: enough to keep its threads busy, little enough to hold in memory.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class TokenDocument:
    """A tokenised document with its separator.

    Attributes:
        ids: [N], the smallest unsigned type that holds the vocabulary.
        learned: [N] whether a token counts as a target; all of them when None.
        origin: names the document in messages.
    """

    ids: Ids
    learned: Mask | None
    origin: str


class Documents(Protocol):
    """Tokenised documents by number: in memory or in a cache on disk."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[D] tokens of every document, its separator included."""

    @property
    def source_of(self) -> npt.NDArray[np.int32]:
        """[D] place of every document's source in the recipe."""

    def ids(self, document: int) -> Ids:
        """Token ids of one document."""

    def learned(self, document: int) -> Mask | None:
        """Whether each of its tokens counts as a target; all of them when None."""

    def origin(self, document: int) -> str:
        """Names the document in messages."""


@dataclass(frozen=True)
class TokenStream:
    """Documents in memory, one behind the other, in the order of training.

    Attributes:
        flat: [N], the smallest unsigned type that holds the vocabulary.
        document_starts: ascending indices into `flat`.
        tokens_by_source: kept tokens of each source, in the recipe's order.
        source_of: [D] place of every document's source in the recipe.
        masks: by document, what counts as a target, where not everything does.
        origins: by document.
    """

    flat: Ids
    document_starts: npt.NDArray[np.int64]
    tokens_by_source: tuple[int, ...]
    source_of: npt.NDArray[np.int32]
    masks: dict[int, Mask]
    origins: tuple[str, ...]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[D] tokens of every document."""
        return np.diff(self.document_starts, append=len(self.flat))

    @property
    def sha256(self) -> str:
        """Identifies the stream's content."""
        return sha256_bytes(self.flat.astype("<u4").tobytes())

    def ids(self, document: int) -> Ids:
        """Token ids of one document."""
        following = document + 1
        end = self.document_starts[following] if following < len(self.document_starts) else len(self.flat)
        return self.flat[self.document_starts[document] : end]

    def learned(self, document: int) -> Mask | None:
        """Whether each of its tokens counts as a target."""
        return self.masks.get(document)

    def origin(self, document: int) -> str:
        """Names the document in messages."""
        return self.origins[document]


def id_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest unsigned type in which every id below `vocab_size` fits: uint16 up to 65,536, never for 128K."""
    return np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32


def separator_of(tokenizer: Any) -> list[int]:
    """What stands behind every document: the end-of-text token, or an empty line where the tokenizer has none."""
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else encode_plain(tokenizer, "\n\n")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Identifies everything in a tokenizer that decides ids: two that differ in it must not share a cache."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sha256_bytes(backend.to_str().encode()) if backend is not None else None
    return fingerprint(
        {
            "class": type(tokenizer).__name__ if backend is None else "fast",
            "rules": rules or sorted(tokenizer.get_vocab().items()),
            "separator": separator_of(tokenizer),
            "template": getattr(tokenizer, "chat_template", None),
        }
    )


@dataclass(frozen=True)
class Batch(Generic[Mark]):
    """Documents that were tokenised together.

    Attributes:
        behind: where reading goes on behind all of them.
        documents: each with where reading goes on behind it.
    """

    behind: Mark
    documents: list[tuple[Mark, TokenDocument]]


class Encoder:
    """Tokenises documents in batches; equal to tokenising them one by one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._separator = separator_of(tokenizer)
        # Not `len(tokenizer)`: added tokens may leave holes, and the highest id is what must fit.
        highest = max(max(tokenizer.get_vocab().values(), default=0), *self._separator, len(tokenizer) - 1)
        self._vocab_size = highest + 1
        self.dtype = id_type(self._vocab_size)

    def encode(self, documents: Sequence[TextDocument], bad: BadRows) -> list[TokenDocument | None]:
        """Every document with the separator behind it; None for a conversation that cannot be learned from.

        Raises:
            ArtefactError: ids that the tokenizer does not have, or more such conversations than `bad` allows.
        """
        texts = [document.text for document in documents if document.ids is None and document.messages is None]
        rows = iter(self._rows(texts) if texts else [])
        encoded: list[TokenDocument | None] = []
        for document in documents:
            if document.messages is not None:
                encoded.append(self._conversation(document, document.messages, bad))
            else:
                ids = self._given(document) if document.ids is not None else self._array(next(rows))
                encoded.append(TokenDocument(ids, None, document.origin))
        return encoded

    def _rows(self, texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, verbose=False, return_attention_mask=False, return_token_type_ids=False
        ).input_ids
        return rows

    def _conversation(self, document: TextDocument, messages: Sequence[Message], bad: BadRows) -> TokenDocument | None:
        try:
            ids, learned = render_chat(self._tokenizer, messages, document.origin)
        except ConversationError as error:
            bad.refuse(str(error.where), error.reason, got=str(error.got) if error.got else None, hint=error.hint)
            return None
        mask = np.append(learned, np.zeros(len(self._separator), dtype=np.bool_))
        return TokenDocument(self._array(ids), mask, document.origin)

    def _array(self, row: Sequence[int]) -> Ids:
        return np.array([*row, *self._separator], dtype=self.dtype)

    def _given(self, document: TextDocument) -> Ids:
        assert document.ids is not None
        check_ids(document.ids, self._vocab_size, document.origin)
        return np.append(document.ids, self._separator).astype(self.dtype)

    def batches(self, documents: Iterable[tuple[Mark, TextDocument]], bad: BadRows) -> Iterator[Batch[Mark]]:
        """A stream of documents through `encode`, each with its mark: where reading goes on behind it."""
        marks: list[Mark] = []
        batch: list[TextDocument] = []
        characters = 0
        for mark, document in documents:
            marks.append(mark)
            batch.append(document)
            characters += len(document.text) if document.ids is None else len(document.ids)
            if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                yield self._batch(marks, batch, bad)
                marks, batch, characters = [], [], 0
        if batch:
            yield self._batch(marks, batch, bad)

    def _batch(self, marks: list[Mark], batch: list[TextDocument], bad: BadRows) -> Batch[Mark]:
        encoded = zip(marks, self.encode(batch, bad), strict=True)
        return Batch(marks[-1], [(mark, document) for mark, document in encoded if document is not None])


def collect_documents(
    tokenizer: Any, sources: Sequence[SourceBlock], demands: Sequence[Demand], seed: int, progress: Progress | None
) -> TokenStream:
    """Whole documents of each source, in reading order, in memory, until its demand is met.

    Raises:
        ArtefactError: the sources hold no text at all.
    """
    encoder = Encoder(tokenizer)
    documents: list[TokenDocument] = []
    source_of: list[int] = []
    by_source = [0] * len(sources)
    total = sum(demand.tokens or 0 for demand in demands)
    for number, (source, demand) in enumerate(zip(sources, demands, strict=True)):
        bad = BadRows(source.max_bad_rows)
        marked = ((None, document) for document in iter_documents(source, seed + number, bad))
        for _, document in chain.from_iterable(batch.documents for batch in encoder.batches(marked, bad)):
            documents.append(document)
            source_of.append(number)
            by_source[number] += len(document.ids)
            demand = demand.after(np.array([len(document.ids)]))
            if progress is not None:
                progress(sum(by_source), total)
            if demand.met:
                break
    if not sum(by_source):
        raise ArtefactError("the sources hold no text", where="data.sources")
    return stream_of(documents, np.array(source_of, dtype=np.int32), tuple(by_source))


def collect_tokens(
    tokenizer: Any, sources: list[SourceBlock], num_tokens: int, seed: int, progress: Progress | None = None
) -> TokenStream:
    """Each source's share of `num_tokens`, to the token, in the order of training: little text, all of it in memory.

    A source that ends early gives what it has; training then repeats its windows in another order.

    Raises:
        ArtefactError: the sources hold no text at all.
    """
    wanted = wanted_tokens(sources, num_tokens)
    read = collect_documents(tokenizer, sources, [Demand(count, most=count) for count in wanted], seed, progress)
    kept: list[TokenDocument] = []
    left = list(wanted)
    for number, source in enumerate(read.source_of.tolist()):
        ids, mask = read.ids(number)[: left[source]], read.learned(number)
        kept.append(TokenDocument(ids, mask[: len(ids)] if mask is not None else None, read.origin(number)))
        left[source] -= len(ids)
    order = np.random.default_rng([seed, 1]).permutation(len(kept))
    given = tuple(count - rest for count, rest in zip(wanted, left, strict=True))
    return stream_of([kept[index] for index in order], read.source_of[order], given)


def stream_of(
    documents: Sequence[TokenDocument],
    source_of: npt.NDArray[np.int32] | None = None,
    tokens_by_source: tuple[int, ...] = (),
) -> TokenStream:
    """Documents one behind the other; of one source when it is not said."""
    lengths = np.array([len(document.ids) for document in documents], dtype=np.int64)
    return TokenStream(
        flat=np.concatenate([document.ids for document in documents]),
        document_starts=np.cumsum(lengths) - lengths,
        tokens_by_source=tokens_by_source,
        source_of=np.zeros(len(documents), dtype=np.int32) if source_of is None else source_of,
        masks={number: document.learned for number, document in enumerate(documents) if document.learned is not None},
        origins=tuple(document.origin for document in documents),
    )
