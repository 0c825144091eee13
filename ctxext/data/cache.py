"""The tokenised sources on disk: built once, shared by every run and process that reads the same text.

    <folder>/<tokenizer>/<part>/segment-00000/     a part of a source, addressed by everything that decides its tokens

A part's name is a fingerprint of tokenizer, source settings and the part's content, so a changed file, tokenizer or
setting finds nothing and is tokenised anew: there is no stale entry that could be read by mistake. How much of a source
is read (`demand.py`) decides nothing: a longer run goes on where a shorter one stopped. Only whole segments exist: a
build that was killed loses the one it was writing. Parts are locked one by one, so two builders at once share the work.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctxext.data.bad_rows import BadRows
from ctxext.data.demand import Demand
from ctxext.data.documents import Part
from ctxext.data.segments import Segment, segments_of
from ctxext.data.sources import no_document_error, source_parts
from ctxext.data.tokenize import Ids, Mask, tokenizer_fingerprint
from ctxext.files import fingerprint
from ctxext.recipe.data import DataBlock, SourceBlock

FOLDER_VARIABLE = "CTXEXT_CACHE_DIR"
# Changes when the same text would give other tokens, or the files another form.
_FORMAT = 1
# Every open segment holds a file; few are needed at a time.
_OPEN_SEGMENTS = 128
# What a source says that does not change the tokens of its documents.
_WITHOUT_EFFECT = ("weight", "min_tokens", "max_tokens", "max_bad_rows", "streaming")


def default_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where caches lie: below `CTXEXT_CACHE_DIR`, else below the user's cache folder."""
    if given := environ.get(FOLDER_VARIABLE):
        return Path(given).expanduser().absolute() / "tokens"
    cache = environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ctxext" / "tokens"


def folder_of(data: DataBlock) -> Path:
    """`data.cache`, or the default."""
    return Path(data.cache).expanduser().absolute() if data.cache else default_folder()


@dataclass(frozen=True)
class PartPlace:
    """One part of one source, and where its tokens lie."""

    source_number: int
    source: SourceBlock
    part: Part
    seed: int
    folder: Path


def places_of(tokenizer: Any, data: DataBlock, folder: Path) -> tuple[list[PartPlace], list[BadRows]]:
    """All parts of all sources, in reading order, and by source which paths could not be used.

    Raises:
        ArtefactError: a source is not there or has no part.
    """
    key = tokenizer_fingerprint(tokenizer)
    places: list[PartPlace] = []
    counts = []
    for number, source in enumerate(data.sources):
        settings = {
            name: value for name, value in source.model_dump(mode="json").items() if name not in _WITHOUT_EFFECT
        }
        seed = data.seed + number
        bad = BadRows(source.max_bad_rows)
        counts.append(bad)
        for part in source_parts(source, seed, bad):
            name = fingerprint([_FORMAT, key, settings, seed, part.name, part.fingerprint], digits=32)
            places.append(PartPlace(number, source, part, seed, folder / key / name))
    return places, counts


class TokenCache:
    """Documents of a cache, by number, as `Documents`.

    Args:
        segments: with the number of their source and how many of their documents are taken.

    Attributes:
        lengths: [D] tokens of every document, its separator included.
        sha256: of all documents in their order, however they are spread over files.
        source_of: [D] place of every document's source in the recipe.
        tokens_by_source: in the recipe's order.
        bad_rows: by source, what was unusable.
        messages: what people should know about the build.
    """

    def __init__(
        self,
        segments: Sequence[tuple[int, Segment, int]],
        num_sources: int,
        bad_rows: Sequence[dict[str, Any]] = (),
        messages: Sequence[str] = (),
    ) -> None:
        self._paths = [segment.path for _, segment, _ in segments]
        taken = [count for _, _, count in segments]
        self._first = np.cumsum([0, *taken])
        self.source_of = np.repeat(np.array([source for source, _, _ in segments], dtype=np.int32), taken)
        parts = [segment.lengths[:count] for _, segment, count in segments]
        self.lengths: npt.NDArray[np.int64] = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        sums = np.bincount(self.source_of, weights=self.lengths, minlength=num_sources)
        self.tokens_by_source = tuple(int(count) for count in sums)
        self.bad_rows = tuple(bad_rows)
        self.messages = tuple(messages)
        digest = hashlib.sha256()
        for _, segment, count in segments:
            digest.update(segment.digests()[:count].astype("<u8").tobytes())
        self.sha256 = digest.hexdigest()
        self._open: Callable[[int], Segment] = lru_cache(_OPEN_SEGMENTS)(lambda number: Segment(self._paths[number]))

    def ids(self, document: int) -> Ids:
        """A view of one document's ids."""
        segment, inside = self._place(document)
        return segment.ids(inside)

    def learned(self, document: int) -> Mask | None:
        """Whether each of its tokens counts as a target; all of them when None."""
        segment, inside = self._place(document)
        return segment.learned(inside)

    def origin(self, document: int) -> str:
        """Names the document in messages."""
        segment, inside = self._place(document)
        return segment.origin(inside)

    def verify(self) -> None:
        """Compare every segment with its checksum, reading all of them.

        Raises:
            ArtefactError: one differs.
        """
        for path in self._paths:
            Segment(path).verify()

    def _place(self, document: int) -> tuple[Segment, int]:
        number = int(np.searchsorted(self._first, document, side="right")) - 1
        return self._open(number), document - int(self._first[number])


def open_cache(
    places: Sequence[PartPlace],
    demands: Sequence[Demand],
    bad_rows: Sequence[BadRows],
    messages: Sequence[str] = (),
) -> TokenCache | None:
    """The cache that these parts make, or None when something is missing.

    Raises:
        ArtefactError: a segment is damaged, too many rows were unusable, or a source has no document.
    """
    left = list(demands)
    counts = [deepcopy(bad) for bad in bad_rows]
    found = [0] * len(demands)
    chosen: list[tuple[int, Segment, int]] = []
    for place in places:
        number, complete = place.source_number, False
        for segment in segments_of(place.folder):
            if left[number].met:
                break
            lengths = segment.lengths
            count = left[number].num_taken(lengths)
            left[number] = left[number].after(lengths[:count])
            counts[number].merge(segment.record.bad_rows)
            found[number] += count
            chosen.append((number, segment, count))
            complete = segment.record.last
        if not (complete or left[number].met):
            return None
    for place in places:
        if not found[place.source_number]:
            raise no_document_error(place.source, counts[place.source_number])
    return TokenCache(chosen, len(demands), [count.facts() for count in counts], messages)
