"""Which documents training reads, how often and in which order: pure, from their lengths alone.

Sources keep their weights. Inside each source, documents come as the cache has them until the source's share of the
tokens is reached; or, when the recipe asks for it, long documents are taken more often than short ones (per-source
length upsampling, Fu et al. 2024, arXiv:2402.10171: raising the share of long text by changing the domain mixture
instead costs more than it gives).

A document is used as one or more *pieces*, half-open token ranges of it:

    lengths [700, 40, 900], max_tokens 500, min_tokens 50, 1,500 tokens wanted
    pieces  (0, 0-350) (0, 350-700) (2, 0-450) (2, 450-800)      document 1 is too short; the last piece ends the share
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ctxext.data.demand import long_from_of, wanted_tokens
from ctxext.errors import ArtefactError, UsageError
from ctxext.recipe.data import DataBlock, LengthBlock, SourceBlock

Ints = npt.NDArray[np.int64]

# Documents of at least half a window are what teaches a model to use a window; below this share it hardly sees any.
_LEAST_LONG_SHARE = 0.1
_NEEDED_QUANTILE = 0.99
_SHARE_REACHED = "its source's share was reached"
# Edges of the length buckets, in windows.
_BUCKET_EDGES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class LeftOut:
    """Tokens that training does not read, and why. `num_documents` is 0 where only a part of one is left out."""

    source: int
    reason: str
    num_documents: int
    num_tokens: int


@dataclass(frozen=True)
class BucketRow:
    """One line of the mixture table: tokens of a source in documents of a length bucket, before and after sampling."""

    source: int
    bucket: str
    tokens_before: int
    tokens_after: int


@dataclass(frozen=True)
class Selection:
    """What training reads, in order; a piece may come several times.

    Attributes:
        documents, begins, ends: [K] document, first token and the one behind the last, of every piece.
        sources: [K] the source of every piece.
        tokens_by_source: of the pieces, repeats included.
        distinct_tokens: of the pieces, each token once; together with `left_out` these are all tokens there were.
        left_out: by source and reason.
        rows: the mixture table.
        notes: what people should know about this selection.
        long_share: share of the tokens in pieces of at least half a window.
    """

    documents: Ints
    begins: Ints
    ends: Ints
    sources: Ints
    tokens_by_source: tuple[int, ...]
    distinct_tokens: int
    left_out: tuple[LeftOut, ...]
    rows: tuple[BucketRow, ...]
    notes: tuple[str, ...]
    long_share: float

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces, repeats included."""
        return int((self.ends - self.begins).sum())

    def table(self) -> tuple[BucketRow, ...]:
        """Tokens per source and length bucket, before and after."""
        return self.rows

    def to_json(self) -> dict[str, Any]:
        """For `--json` and run folders; without the pieces."""
        return {
            "num_pieces": len(self.documents),
            "num_tokens": self.num_tokens,
            "distinct_tokens": self.distinct_tokens,
            "tokens_by_source": list(self.tokens_by_source),
            "long_share": self.long_share,
            "left_out": [vars(entry) for entry in self.left_out],
            "table": [vars(row) for row in self.rows],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Pieces:
    """Pieces of one source: [P] each."""

    documents: Ints
    begins: Ints
    ends: Ints

    @property
    def lengths(self) -> Ints:
        return self.ends - self.begins

    def take(self, which: npt.NDArray[Any]) -> _Pieces:
        return _Pieces(self.documents[which], self.begins[which], self.ends[which])

    @staticmethod
    def joined(parts: list[_Pieces]) -> _Pieces:
        return _Pieces(
            np.concatenate([part.documents for part in parts]),
            np.concatenate([part.begins for part in parts]),
            np.concatenate([part.ends for part in parts]),
        )


def choose_documents(
    lengths: npt.NDArray[Any],
    source_of: npt.NDArray[Any],
    data: DataBlock,
    *,
    num_tokens: int,
    window_tokens: int,
    seed: int,
    excluded: Mapping[int, str] | None = None,
    allow_short: bool = False,
) -> Selection:
    """The pieces that give `num_tokens`, each source its share of them.

    Args:
        lengths: [D] tokens of every document, the separator behind it included.
        source_of: [D] the place of every document's source in `data.sources`.
        window_tokens: of a training row; half of it is where a document begins to count as long.
        excluded: documents that must not be read, with the reason.
        allow_short: leave it to the caller to ask `too_short`.

    Raises:
        ArtefactError: a source has no document left.
        UsageError: full-length windows would hold hardly any long document, see `data.length.allow_short`.
    """
    lengths, source_of = np.asarray(lengths, dtype=np.int64), np.asarray(source_of, dtype=np.int64)
    long_from = long_from_of(data.length, window_tokens)
    chosen: list[_Pieces] = []
    left_out: list[LeftOut] = []
    notes: list[str] = []
    for number, (source, wanted) in enumerate(zip(data.sources, wanted_tokens(data.sources, num_tokens), strict=True)):
        usable, unused = _usable(np.flatnonzero(source_of == number), lengths, source, number, excluded or {})
        if data.length.long_share is None and data.length.upsample is None:
            pieces, said = _first(usable, wanted), _ends_early(usable, wanted)
        else:
            pieces, said = _length_aware(usable, wanted, long_from, data.length, [seed, 2, number])
        if said:
            notes.append(f"data.sources[{number}] ({source.kind}): {said}")
        chosen.append(pieces)
        left_out += [*unused, *_unread(usable, pieces, number)]
    selection = _ordered(chosen, left_out, notes, lengths, source_of, window_tokens, seed)
    if not allow_short and (error := too_short(selection, data, window_tokens)):
        raise error
    return selection


def too_short(selection: Selection, data: DataBlock, window_tokens: int) -> UsageError | None:
    """What speaks against full-length windows of this selection: hardly any long document in them."""
    if data.windows.mode != "full-length" or data.length.allow_short or selection.long_share >= _LEAST_LONG_SHARE:
        return None
    return UsageError(
        f"only {selection.long_share:.1%} of the training tokens come from documents of at least half a window "
        f"({-(-window_tokens // 2):,} tokens), so full-length windows would be short documents in a row and teach "
        "little about long context",
        where="data.length.allow_short",
        expected=f"at least {_LEAST_LONG_SHARE:.0%}",
        hint="Add longer documents, raise data.length.long_share, lower target_length, or set "
        "data.length.allow_short=true to train all the same.",
    )


def _usable(
    documents: Ints, lengths: Ints, source: SourceBlock, number: int, excluded: Mapping[int, str]
) -> tuple[_Pieces, list[LeftOut]]:
    """A source's documents that may be read, cut to `max_tokens`, and those that may not."""
    left_out = []
    reasons: dict[str, Ints] = {}
    for reason in dict.fromkeys(excluded.values()):
        named = np.fromiter((key for key, value in excluded.items() if value == reason), dtype=np.int64)
        reasons[reason] = np.intersect1d(documents, named)
    if source.min_tokens:
        reasons[f"shorter than min_tokens ({source.min_tokens})"] = documents[lengths[documents] < source.min_tokens]
    for reason, dropped in reasons.items():
        dropped = dropped[np.isin(dropped, documents)]  # counted once, under the first reason
        if len(dropped):
            left_out.append(LeftOut(number, reason, len(dropped), int(lengths[dropped].sum())))
            documents = documents[~np.isin(documents, dropped)]
    if not len(documents) or not lengths[documents].sum():
        said = "; ".join(f"{entry.num_documents} {entry.reason}" for entry in left_out)
        raise ArtefactError(
            "a source has a weight and no usable document",
            where=f"data.sources[{number}] ({source.kind})",
            got=said or "no document",
            hint="Leave the source out, or change what drops its documents.",
        )
    return _pieces_of(documents, lengths[documents], source.max_tokens), left_out


def _pieces_of(documents: Ints, lengths: Ints, max_tokens: int | None) -> _Pieces:
    """Whole documents, or equal pieces of at most `max_tokens`: equal, so that no short rest is left over."""
    counts = np.ones_like(lengths) if max_tokens is None else np.maximum(-(-lengths // max_tokens), 1)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    whole, parts = np.repeat(lengths, counts), np.repeat(counts, counts)
    return _Pieces(np.repeat(documents, counts), place * whole // parts, (place + 1) * whole // parts)


def _first(pieces: _Pieces, wanted: int) -> _Pieces:
    """Pieces in their order until they give `wanted` tokens; the last one is cut there."""
    ends = np.cumsum(pieces.lengths)
    count = min(int(np.searchsorted(ends, wanted)) + 1, len(ends))
    taken = pieces.take(np.arange(count))
    surplus = max(int(ends[count - 1]) - wanted, 0)
    taken.ends[-1] -= surplus
    return taken


def _ends_early(pieces: _Pieces, wanted: int) -> str | None:
    """What to say about a source that has less than its share."""
    available = int(pieces.lengths.sum())
    if available >= wanted:
        return None
    return f"has {available:,} of the {wanted:,} tokens of its share, so the others count for more than their weight"


def _length_aware(
    pieces: _Pieces, wanted: int, long_from: int, length: LengthBlock, seed: list[int]
) -> tuple[_Pieces, str]:
    """`wanted` tokens, of which the asked share comes from long pieces; both kinds are repeated where they run out."""
    is_long = pieces.lengths >= long_from
    tokens_long = int(pieces.lengths[is_long].sum())
    tokens_short = int(pieces.lengths.sum()) - tokens_long
    natural = tokens_long / (tokens_long + tokens_short)
    if length.long_share is not None:
        share = length.long_share
    else:
        assert length.upsample is not None
        share = length.upsample * tokens_long / (length.upsample * tokens_long + tokens_short)
    said = f"{share:.0%} of its tokens are read from documents of {long_from:,} or more (it has {natural:.0%})"
    if not tokens_long:
        said, share = f"no document has {long_from:,} tokens, so all of its share comes from shorter ones", 0.0
    elif not tokens_short and share < 1:
        said, share = f"every document has {long_from:,} tokens or more, so there is no short text to mix in", 1.0
    long_wanted = round(wanted * share)
    parts, repeats = [], []
    for kind, (which, budget) in enumerate(((is_long, long_wanted), (~is_long, wanted - long_wanted))):
        if budget:
            drawn, passes = _drawn(pieces.take(which), budget, [*seed, kind])
            parts.append(drawn)
            if passes > 1:
                repeats.append(f"{'long' if kind == 0 else 'shorter'} ones {passes:.1f} times")
    return _Pieces.joined(parts), f"{said}; {' and '.join(repeats)} each" if repeats else said


def _drawn(pieces: _Pieces, budget: int, seed: list[int]) -> tuple[_Pieces, float]:
    """Pieces in seeded order, again and again until they give `budget` tokens; and how often that is on average."""
    available = int(pieces.lengths.sum())
    order = np.random.default_rng(seed).permutation(len(pieces.ends))
    return _first(pieces.take(np.tile(order, -(-budget // available))), budget), budget / available


def _unread(usable: _Pieces, chosen: _Pieces, number: int) -> list[LeftOut]:
    """What of the usable pieces no chosen one covers; a piece is only ever cut at its end."""
    key = np.lexsort((usable.begins, usable.documents))
    ordered = usable.take(key)
    # Documents and begins are ascending together, so a pair finds its place by one number.
    stride = int(max(ordered.ends.max(), 1)) + 1
    at = np.searchsorted(ordered.documents * stride + ordered.begins, chosen.documents * stride + chosen.begins)
    read = np.zeros(len(ordered.ends), dtype=np.int64)
    np.maximum.at(read, at, chosen.lengths)
    missing = ordered.lengths - read
    untouched = np.setdiff1d(ordered.documents, chosen.documents)
    if not missing.sum():
        return []
    return [LeftOut(number, _SHARE_REACHED, len(untouched), int(missing.sum()))]


def _ordered(
    chosen: list[_Pieces],
    left_out: list[LeftOut],
    notes: list[str],
    lengths: Ints,
    source_of: Ints,
    window_tokens: int,
    seed: int,
) -> Selection:
    """All sources mixed in one seeded order, with what people want to know about it."""
    pieces = _Pieces.joined(chosen)
    sources = np.repeat(np.arange(len(chosen)), [len(part.ends) for part in chosen])
    order = np.random.default_rng([seed, 1]).permutation(len(pieces.ends))
    tokens = pieces.lengths
    is_long = 2 * tokens >= window_tokens
    return Selection(
        documents=pieces.documents[order],
        begins=pieces.begins[order],
        ends=pieces.ends[order],
        sources=sources[order],
        tokens_by_source=tuple(int(part.lengths.sum()) for part in chosen),
        distinct_tokens=int(lengths.sum()) - sum(entry.num_tokens for entry in left_out),
        left_out=tuple(left_out),
        rows=tuple(_rows(lengths, source_of, tokens, sources, len(chosen), window_tokens)),
        notes=tuple(notes),
        long_share=float(tokens[is_long].sum() / max(tokens.sum(), 1)),
    )


def _rows(
    before: Ints, source_before: Ints, after: Ints, source_after: Ints, num_sources: int, window_tokens: int
) -> list[BucketRow]:
    """Buckets that hold something, by source; a piece counts with its own length."""
    edges = sorted({max(int(window_tokens * edge), 1) for edge in _BUCKET_EDGES})
    names = [
        f"below {edges[0]:,}",
        *(f"{low:,} to {high - 1:,}" for low, high in pairwise(edges)),
        f"{edges[-1]:,} or more",
    ]
    tables = []
    for tokens, source in ((before, source_before), (after, source_after)):
        place = source * len(names) + np.searchsorted(edges, tokens, side="right")
        # Weights of bincount are floats, exact for integers up to 2^53.
        sums = np.bincount(place, weights=tokens, minlength=num_sources * len(names))
        tables.append(sums.astype(np.int64).reshape(num_sources, len(names)))
    return [
        BucketRow(source, name, int(tables[0][source, column]), int(tables[1][source, column]))
        for source in range(num_sources)
        for column, name in enumerate(names)
        if tables[0][source, column] or tables[1][source, column]
    ]


def target_advice(lengths: npt.NDArray[Any], original_length: int, target_length: int) -> str | None:
    """Whether a smaller target length would hold the user's own documents; None when the target is needed.

    Args:
        lengths: tokens of the documents that stand for what the model shall read.
    """
    if not len(lengths):
        return None
    needed, longest = int(np.quantile(lengths, _NEEDED_QUANTILE, method="higher")), int(np.max(lengths))
    if 2 * needed > target_length:
        return None
    most = f"{_NEEDED_QUANTILE:.0%} of your {len(lengths):,} documents"
    said = f"{most} have at most {needed:,} tokens (longest {longest:,})"
    cost = "extending further than needed costs quality at short lengths"
    if needed <= original_length:
        return (
            f"{said}, which the model reaches unextended ({original_length:,}); unless several of them are read "
            f"together, no extension is needed, and {cost}"
        )
    smaller = target_length
    while smaller // 2 >= needed and smaller // 2 > original_length:
        smaller //= 2
    if smaller == target_length:
        return None
    return f"{said}; unless several of them are read together, target_length={smaller} would do, and {cost}"
