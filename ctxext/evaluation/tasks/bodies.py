"""Bodies: the long part of a prompt, made of exactly as many token ids as there is room.

Every piece is encoded apart and never again, so lengths add up; a rest that no whole unit fits into is filled with
cut filler text where that is natural (a haystack, a last document) and with line breaks where it is not (a list, JSON).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ctxext.evaluation.tasks.base import Filled, Item, Kit, NoRoomError, Span

# A filler that is cut shorter than this looks like an accident; line breaks take its place.
_SHORTEST_CUT = 8


@dataclass(frozen=True)
class InText:
    """Items between the sentences of the haystack; without items, `depth` says where one would stand."""

    items: tuple[Item, ...]
    depth: float = 0.0

    def fill(self, room: int, kit: Kit) -> Filled:
        """Haystack ids with every item behind the sentence end that is nearest to its depth."""
        encoded = [kit.encode(item.text) for item in self.items]
        taken = sum(map(len, encoded))
        if room < max(2 * taken, 1):
            raise NoRoomError(max(2 * taken, 1))
        hay = kit.haystack(room - taken)
        places = [kit.ends.nearest(hay, round(item.depth * len(hay))) for item in self.items]
        order = sorted(range(len(places)), key=lambda i: (places[i], self.items[i].depth, i))
        ids, spans, copied = list[int](), dict[int, Span](), 0
        for number in order:
            ids += hay[copied : places[number]]
            copied = places[number]
            spans[number] = Span(len(ids), len(ids) + len(encoded[number]), self.items[number].asked)
            ids += encoded[number]
        ids += hay[copied:]
        nowhere = kit.ends.nearest(hay, round(self.depth * len(hay)))
        return _filled(ids, [spans[number] for number in range(len(places))], nowhere, hay)


@dataclass(frozen=True)
class InList:
    """Items among filler units of the same form: needles among needles, pairs in JSON, documents, lines.

    Attributes:
        filler: draws one more unit that holds no answer.
        numbering: stands before every unit, with `{i}` counting from 1.
        cut_last: the last filler may be cut to fill the rest.
    """

    items: tuple[Item, ...]
    filler: Callable[[random.Random], str]
    separator: str
    numbering: str = ""
    opening: str = ""
    closing: str = ""
    cut_last: bool = False

    def fill(self, room: int, kit: Kit) -> Filled:
        """As many units as fit, the items at their depths among them."""
        opening, closing = (kit.encode(text) if text else [] for text in (self.opening, self.closing))
        separator = kit.encode(self.separator)
        encoded = [kit.encode(item.text) for item in self.items]
        numbers = [self._number(i, kit) for i in range(1, len(encoded) + 1)]
        left = room - len(opening) - len(closing) - len(separator) * (len(encoded) - 1)
        left -= sum(map(len, encoded)) + sum(map(len, numbers))
        rng, fillers = random.Random(f"{kit.seed}/filler"), list[list[int]]()
        while True:
            unit, number = kit.encode(self.filler(rng)), self._number(len(numbers) + 1, kit)
            around = len(separator) + len(number)
            if around + len(unit) > left:
                break
            fillers.append(unit)
            numbers.append(number)
            left -= around + len(unit)
        if not fillers:
            raise NoRoomError(room - left + around + len(unit))
        if self.cut_last and left - around >= _SHORTEST_CUT:
            fillers.append(unit[: left - around])
            numbers.append(number)
            left = 0
        places = [round(item.depth * len(fillers)) for item in self.items]
        queue = sorted(range(len(places)), key=lambda i: (places[i], self.items[i].depth, i))
        ids, spans, next_filler = [*[kit.padding] * left, *opening], dict[int, Span](), 0
        for count, number in enumerate(numbers):
            if count:
                ids += separator
            ids += number
            if queue and places[queue[0]] <= next_filler:
                item = queue.pop(0)
                spans[item] = Span(len(ids), len(ids) + len(encoded[item]), self.items[item].asked)
                ids += encoded[item]
            else:
                ids += fillers[next_filler]
                next_filler += 1
        ids += closing
        return _filled(ids, [spans[item] for item in range(len(places))], 0, None)

    def _number(self, i: int, kit: Kit) -> list[int]:
        return kit.encode(self.numbering.format(i=i)) if self.numbering else []


@dataclass(frozen=True)
class NumberedWords:
    """`1. word 2. word ...`: the common words often, as many uncommon ones as fit rarely, all shuffled."""

    common: tuple[str, ...]
    uncommon: tuple[str, ...]
    common_repeats: int
    uncommon_repeats: int

    def fill(self, room: int, kit: Kit) -> Filled:
        """Costs do not depend on the order, since number and word are encoded apart; so they can be added up first."""
        words = {word: kit.encode(f" {word}") for word in (*self.common, *self.uncommon)}
        total = len(self.common) * self.common_repeats
        numbers = [kit.encode(f" {i}.") for i in range(1, total + 1)]
        used = sum(map(len, numbers)) + self.common_repeats * sum(len(words[word]) for word in self.common)
        taken = 0
        for word in self.uncommon:
            more = [kit.encode(f" {i}.") for i in range(len(numbers) + 1, len(numbers) + 1 + self.uncommon_repeats)]
            cost = sum(map(len, more)) + self.uncommon_repeats * len(words[word])
            if used + cost > room:
                break
            used, taken = used + cost, taken + 1
            numbers += more
        assert taken < len(self.uncommon), "the vocabulary is drawn larger than any prompt of its length"
        if not taken:
            raise NoRoomError(used + cost)
        order = [*self.common * self.common_repeats, *self.uncommon[:taken] * self.uncommon_repeats]
        random.Random(f"{kit.seed}/filler").shuffle(order)
        ids = [kit.padding] * (room - used)
        for number, word in zip(numbers, order, strict=True):
            ids += [*number, *words[word]]
        return _filled(ids, [], 0, None)


@dataclass(frozen=True)
class CodedWords:
    """Coded words by falling frequency (`counts(n)` for n words in all), the first being noise dots, shuffled."""

    words: tuple[str, ...]
    counts: Callable[[int], list[int]]
    num_asked: int

    def fill(self, room: int, kit: Kit) -> Filled:
        """The largest n that fits, found by halving: the cost never falls as n grows."""
        encoded = [kit.encode(f" {word}") for word in self.words]

        def cost(size: int) -> int:
            return sum(count * len(ids) for count, ids in zip(self.counts(size), encoded, strict=True))

        low, high = 0, room
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle) <= room else (low, middle - 1)
        counts, size = self.counts(low), low
        while not self._stand_out(self.counts(size)):
            size += 1
        if size > low:
            raise NoRoomError(cost(size))
        order = [ids for ids, count in zip(encoded, counts, strict=True) for _ in range(count)]
        random.Random(f"{kit.seed}/filler").shuffle(order)
        ids = [kit.padding] * (room - cost(low))
        for word in order:
            ids += word
        return _filled(ids, [], 0, None)

    def _stand_out(self, counts: list[int]) -> bool:
        """Whether the asked words are more frequent than all that follow."""
        return counts[self.num_asked] > counts[self.num_asked + 1]


def _filled(ids: list[int], spans: list[Span], nowhere: int, hay: list[int] | None) -> Filled:
    asked = [span.start for span in spans if span.asked]
    return Filled(ids, tuple(spans), asked[0] if asked else nowhere, hay)
