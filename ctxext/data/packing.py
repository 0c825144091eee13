"""Training windows of exactly the asked length; pure given the token stream.

A window that carries facts is text with the statements put between sentences, and the questions with their answers at
the end:

    text ... statement ... text ... | question answer question answer
    positions 0, 1, ...       (gap)       ... up to target_length - 1

In skip-wise windows the gap lies between the last statement and the questions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctxext.data.boundaries import SentenceEnds, encode_plain
from ctxext.data.facts import make_fact
from ctxext.data.positions import consecutive_positions, skip_wise_positions
from ctxext.data.tokenize import TokenStream
from ctxext.errors import UsageError
from ctxext.recipe.data import DataBlock


@dataclass(frozen=True)
class PackedWindow:
    """One training row.

    Attributes:
        input_ids: [S] token ids.
        position_ids: [S] positions, ascending.
        document_starts: indices in [0, S) at which a document begins.
        num_facts: synthetic facts in it.
    """

    input_ids: list[int]
    position_ids: list[int]
    document_starts: list[int]
    num_facts: int


@dataclass(frozen=True)
class _Window:
    """Token ids, where documents begin, and the first and last index at which the required gap may lie."""

    ids: list[int]
    document_starts: list[int]
    earliest_cut: int
    latest_cut: int


class WindowBuilder:
    """Builds window number `index` of epoch `epoch` as a pure function of both, the stream and the data block."""

    def __init__(self, stream: TokenStream, data: DataBlock, tokenizer: Any, target_length: int) -> None:
        self._stream = stream
        self._data = data
        self._tokenizer = tokenizer
        self._target_length = target_length
        self._sentence_ends = SentenceEnds(tokenizer)
        self.length = data.windows.length or target_length
        self.num_windows = max(len(stream.ids) // self.length, 1)
        if len(stream.ids) < self.length:
            raise UsageError(
                "the training text is shorter than one window",
                where="data.sources",
                got=len(stream.ids),
                expected=f"at least {self.length} tokens",
            )

    def build(self, epoch: int, index: int) -> PackedWindow:
        """The window.

        Raises:
            UsageError: the facts leave no room for text.
        """
        rng = random.Random(f"window/{self._data.seed}/{epoch}/{index}")
        begin = index * self.length
        text = [int(token) for token in self._stream.ids[begin : begin + self.length]]
        starts = self._stream.document_starts
        inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, begin + self.length)] - begin
        window = _Window(text, [int(start) for start in inside], 1, self.length - 1)
        facts, num_facts = self._data.facts, 0
        if facts is not None and rng.random() < facts.share:
            window, num_facts = self._with_facts(window, rng), facts.per_window
        positions = self._positions(window.earliest_cut, window.latest_cut, rng)
        return PackedWindow(window.ids, positions, window.document_starts, num_facts)

    def _with_facts(self, text: _Window, rng: random.Random) -> _Window:
        """`text` with facts, and a range of cuts in which a gap separates every statement from the questions."""
        assert self._data.facts is not None
        facts = [make_fact(self._data.facts.style, rng) for _ in range(self._data.facts.per_window)]
        statements = [encode_plain(self._tokenizer, fact.statement) for fact in facts]
        tail: list[int] = []
        for fact in rng.sample(facts, len(facts)):
            tail += encode_plain(self._tokenizer, fact.question + fact.answer)
        room = self.length - len(tail) - sum(len(statement) for statement in statements)
        if room < self.length // 4:
            raise UsageError(
                "facts and questions leave less than a quarter of a window for text",
                where="data.facts.per_window",
                got=self._data.facts.per_window,
                expected="fewer facts or longer windows",
            )
        body = text.ids[:room]
        # Statements are placed from the back, so that earlier places stay valid; depths 0 and 1 are both reached.
        places = sorted((self._sentence_ends.nearest(body, rng.randint(0, room)) for _ in statements), reverse=True)
        for place, statement in zip(places, statements, strict=True):
            body[place:place] = statement
        # All documents that begin behind a statement move by its length.
        starts = [
            start + sum(len(statement) for place, statement in zip(places, statements, strict=True) if place <= start)
            for start in text.document_starts
            if start < room
        ]
        last_statement_end = places[0] + sum(len(statement) for statement in statements)
        return _Window(body + tail, starts, min(last_statement_end, len(body)), len(body))

    def _positions(self, earliest_cut: int, latest_cut: int, rng: random.Random) -> list[int]:
        windows = self._data.windows
        if windows.mode == "full-length":
            return consecutive_positions(self.length)
        wanted = windows.chunks - 1
        first = rng.randint(max(earliest_cut, 1), max(latest_cut, 1))
        others = rng.sample([cut for cut in range(1, self.length) if cut != first], wanted - 1)
        return skip_wise_positions(sorted([first, *others]), self.length, self._target_length, rng)
