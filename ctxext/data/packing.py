"""Training windows of exactly the asked length; pure given the documents.

Which tokens a window holds says its layout (`layout.py`). A window that carries facts is text with the statements put
between sentences, and the questions with their answers at the end:

    text ... statement ... text ... | question answer question answer
    positions 0, 1, ...       (gap)       ... up to target_length - 1

In skip-wise windows the gap lies between the last statement and the questions. The text at a window's end makes room.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ctxext.data.boundaries import SentenceEnds, encode_plain
from ctxext.data.facts import make_fact
from ctxext.data.layout import FindCut, Layout, Pieces, PieceTable, concatenate, pack_best_fit
from ctxext.data.order import Cursor, Share, share_of, windows_after
from ctxext.data.positions import consecutive_positions, restarting_positions, shifted_positions, skip_wise_positions
from ctxext.data.tokenize import Documents, separator_of
from ctxext.errors import UsageError
from ctxext.recipe.data import DataBlock

# A long document is cut behind the last sentence that ends in this last part of a window, if one does.
_CUT_WITHIN = 8


@dataclass(frozen=True)
class PackedWindow:
    """One training row.

    Attributes:
        input_ids: [S] token ids.
        position_ids: [S] positions; ascending, but where documents are isolated and begin at 0 again.
        document_starts: indices in [0, S) at which a document begins.
        num_facts: synthetic facts in it.
        learned: [S] whether a token counts as a target; all of them when None.
    """

    input_ids: list[int]
    position_ids: list[int]
    document_starts: list[int]
    num_facts: int
    learned: list[bool] | None = None

    @property
    def num_targets(self) -> int:
        """Tokens that the loss counts; the first one has nothing before it."""
        return len(self.input_ids) - 1 if self.learned is None else sum(self.learned[1:])


@dataclass(frozen=True)
class WindowText:
    """The text of a window before facts and positions.

    Attributes:
        ids: token ids.
        document_starts: where documents begin.
        learned: whether a token counts as a target; all of them when None.
        earliest_cut, latest_cut: between them lies the gap that skip-wise positions need.
    """

    ids: list[int]
    document_starts: list[int]
    learned: list[bool] | None
    earliest_cut: int
    latest_cut: int


def layout_of(pieces: PieceTable, data: DataBlock, length: int, find_cut: FindCut) -> Layout:
    """What `windows.packing` asks for."""
    if data.windows.packing == "best-fit":
        return pack_best_fit(pieces, length, data.seed, find_cut)
    return concatenate(pieces, length)


class WindowAssembler:
    """Makes windows from a layout's runs: pads, puts facts in, gives positions."""

    def __init__(self, data: DataBlock, tokenizer: Any, target_length: int) -> None:
        self.length = data.windows.length or target_length
        self.isolated = data.windows.positions == "per-document"
        self._data = data
        self._tokenizer = tokenizer
        self._target_length = target_length
        self._sentence_ends = SentenceEnds(tokenizer)
        self._padding: int = separator_of(tokenizer)[-1]

    def find_cut(self, documents: Documents) -> FindCut:
        """Behind the last sentence that ends in the last eighth of a window; at the window's end if none does."""

        def find(document: int, begin: int, limit: int) -> int:
            floor = limit - (limit - begin) // _CUT_WITHIN
            ids = documents.ids(document)[floor:limit].tolist()
            return floor + self._sentence_ends.last_before(ids, limit - floor, 0)

        return find

    def text(self, documents: Documents, layout: Layout, index: int) -> WindowText:
        """The tokens of one window."""
        runs = layout.runs(index)
        ids = np.full(self.length, self._padding, dtype=np.int64)
        learned: npt.NDArray[np.bool_] | None = None
        starts: list[int] = []
        at = 0
        for document, begin, end, fresh in zip(
            *(column[runs].tolist() for column in (layout.documents, layout.begins, layout.ends, layout.fresh)),
            strict=True,
        ):
            if fresh:
                starts.append(at)
            behind = at + end - begin
            ids[at:behind] = documents.ids(document)[begin:end]
            if (mask := documents.learned(document)) is not None:
                learned = np.ones(self.length, dtype=np.bool_) if learned is None else learned
                learned[at:behind] = mask[begin:end]
            at = behind
        if at < self.length:
            learned = np.ones(self.length, dtype=np.bool_) if learned is None else learned
            learned[at:] = False
            starts.append(at)
        return WindowText(ids.tolist(), starts, learned.tolist() if learned is not None else None, 1, self.length - 1)

    def rng(self, epoch: int, index: int) -> random.Random:
        """The randomness of one window of an epoch (of a stream: of a block), whichever process builds it when."""
        return random.Random(f"window/{self._data.seed}/{epoch}/{index}")

    def carries_facts(self, rng: random.Random) -> bool:
        """Whether the window that `rng` belongs to gets facts; the first thing that is drawn from it."""
        return self._data.facts is not None and rng.random() < self._data.facts.share

    def cost(self, layout: Layout, index: int, rng: random.Random) -> int:
        """Attention's share of the work in isolated documents: the sum of the squares of their lengths."""
        if self.carries_facts(rng):
            return self.length**2
        runs = layout.runs(index)
        lengths = layout.ends[runs] - layout.begins[runs]
        return int(np.square([*lengths, self.length - lengths.sum()]).sum())

    def finish(self, text: WindowText, rng: random.Random) -> PackedWindow:
        """The window.

        Raises:
            UsageError: the facts leave no room for text.
        """
        num_facts = 0
        if self.carries_facts(rng):
            assert self._data.facts is not None
            text, num_facts = self._with_facts(text, rng), self._data.facts.per_window
            if self.isolated:  # the questions must see the statements, so this window is one document
                text = replace(text, document_starts=[0])
        learned = text.learned
        if self.isolated and any(text.document_starts):
            # Nothing before the first token of an isolated document could tell what it will be.
            learned = learned or [True] * self.length
            for start in text.document_starts:
                learned[start] = False
        return PackedWindow(text.ids, self._positions(text, rng), text.document_starts, num_facts, learned)

    def _with_facts(self, text: WindowText, rng: random.Random) -> WindowText:
        """`text` with facts, and a range of cuts in which a gap separates every statement from the questions."""
        assert self._data.facts is not None
        facts = [make_fact(self._data.facts.style, rng) for _ in range(self._data.facts.per_window)]
        statements = [encode_plain(self._tokenizer, text) for fact in facts for text in fact.statements]
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
        learned = text.learned[:room] if text.learned is not None else None
        # Statements are placed from the back, so that earlier places stay valid; depths 0 and 1 are both reached.
        places = sorted((self._sentence_ends.nearest(body, rng.randint(0, room)) for _ in statements), reverse=True)
        for place, statement in zip(places, statements, strict=True):
            body[place:place] = statement
            if learned is not None:
                learned[place:place] = [True] * len(statement)
        # All documents that begin behind a statement move by its length.
        starts = [
            start + sum(len(statement) for place, statement in zip(places, statements, strict=True) if place <= start)
            for start in text.document_starts
            if start < room
        ]
        last_statement_end = places[0] + sum(len(statement) for statement in statements)
        return WindowText(
            body + tail,
            starts,
            learned + [True] * len(tail) if learned is not None else None,
            min(last_statement_end, len(body)),
            len(body),
        )

    def _positions(self, text: WindowText, rng: random.Random) -> list[int]:
        windows = self._data.windows
        if windows.mode == "full-length":
            if windows.positions == "per-document":
                return restarting_positions(text.document_starts, self.length)
            if windows.positions == "random-shift":
                return shifted_positions(self.length, self._target_length, rng)
            return consecutive_positions(self.length)
        wanted = windows.chunks - 1
        first = rng.randint(max(text.earliest_cut, 1), max(text.latest_cut, 1))
        others = rng.sample([cut for cut in range(1, self.length) if cut != first], wanted - 1)
        return skip_wise_positions(
            sorted([first, *others]), self.length, self._target_length, rng, to_the_end=windows.skips == "full-range"
        )


class WindowBuilder:
    """Builds window number `index` of epoch `epoch` as a pure function of both, the documents and the data block.

    Args:
        pieces: what of the documents is read, in order; all of them, uncut, when left out.
    """

    def __init__(
        self,
        documents: Documents,
        data: DataBlock,
        tokenizer: Any,
        target_length: int,
        pieces: PieceTable | None = None,
    ) -> None:
        self._documents = documents
        self._assembler = WindowAssembler(data, tokenizer, target_length)
        self.length = self._assembler.length
        pieces = pieces or Pieces.whole(documents.lengths)
        self.layout = layout_of(pieces, data, self.length, self._assembler.find_cut(documents))
        self.num_windows = self.layout.num_windows
        if not self.num_windows:
            raise UsageError(
                "the training text is shorter than one window",
                where="data.sources",
                got=self.layout.ledger.tokens_in,
                expected=f"at least {self.length} tokens",
            )

    def build(self, epoch: int, index: int) -> PackedWindow:
        """The window.

        Raises:
            UsageError: the facts leave no room for text.
        """
        return self._assembler.finish(self.text(index), self._assembler.rng(epoch, index))

    def text(self, index: int) -> WindowText:
        """The window's tokens before facts and positions."""
        return self._assembler.text(self._documents, self.layout, index)

    def step_windows(self, cursor: Cursor, count: int, share: Share) -> list[PackedWindow]:
        """One process's share of the `count` windows behind `cursor`.

        Where documents are isolated, windows differ in cost, and the processes get equal shares of it.
        """
        chosen = windows_after(cursor, count, self.num_windows)
        costs = None
        if self._assembler.isolated:
            costs = [
                self._assembler.cost(self.layout, index, self._assembler.rng(epoch, index)) for epoch, index in chosen
            ]
        return [self.build(*chosen[place]) for place in share_of(count, share, costs)]

    def stream_state(self) -> None:
        """Nothing to keep: the order is a pure function of the step."""

    def restore(self, state: dict[str, Any] | None, num_consumed: int) -> None:
        """Nothing to restore, see `stream_state`."""
