"""Runs of words as numbers, for a whole batch of texts at once: what finds the same passage in two texts quickly.

Texts are compared as words in lower case: line breaks, punctuation and indentation hide nothing. A word becomes the sum
of one random 64-bit number for each of its bytes and places (tabulation hashing, Zobrist 1970), a run of words the
weighted sum of its words. Different runs have the same number about once in 2^64, and who must be sure compares
`plain_words` of both. Scripts without spaces count every character as a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

MAX_RUN_WORDS = 32
# Batches that stay in the processor's cache; a longer text is a batch of its own.
BATCH_BYTES = 1 << 20
# Bytes of a word behind this place count without their order; such words are data, not prose.
_WORD_PLACES = 64


@dataclass(frozen=True)
class Batch:
    """Words of several texts.

    Attributes:
        data: [N] the texts as UTF-8, in lower case where they are not ASCII, each behind a line break.
        first_word: [T + 1] the number of every text's first word, and that of all words.
        begins, ends: [W] where every word stands in `data`.
        words: [W] their hashes.
    """

    data: Bytes
    first_word: Ints
    begins: Ints
    ends: Ints
    words: Hashes

    def runs(self, lengths: Sequence[int]) -> Iterator[tuple[int, Hashes, npt.NDArray[np.bool_]]]:
        """For every run length, ascending: the length, the hash of the run that begins at each word that a run of this
        length could begin at in `data`, and whether it stays inside its text."""
        total = np.zeros(len(self.words), dtype=np.uint64)
        wanted = sorted(lengths)
        for length in range(1, (wanted[-1] if wanted else 0) + 1):
            count = max(len(self.words) - length + 1, 0)
            total[:count] += self.words[length - 1 :] * _RUN_WEIGHTS[length - 1]
            if length in wanted:
                inside = np.ones(count, dtype=np.bool_)
                ends = self.first_word[1:-1]
                for back in range(1, length):
                    crossing = ends - back
                    inside[crossing[(crossing >= 0) & (crossing < count)]] = False
                yield length, total[:count].copy(), inside

    def text(self, word: int, length: int) -> str:
        """The run of `length` words from `word` on, as it stands in the text (in lower case where not ASCII)."""
        return self.data[self.begins[word] : self.ends[word + length - 1]].tobytes().decode("utf-8", errors="replace")


def batches(texts: Iterable[str], size: int = BATCH_BYTES) -> Iterator[tuple[int, Batch]]:
    """Texts as batches of about `size` bytes, with the number of each batch's first text."""
    first, waiting, num_bytes = 0, list[bytes](), 0
    for text in texts:
        waiting.append(_encoded(text))
        num_bytes += len(waiting[-1])
        if num_bytes >= size:
            yield first, make_batch(waiting)
            first, waiting, num_bytes = first + len(waiting), [], 0
    if waiting:
        yield first, make_batch(waiting)


def plain_words(text: str) -> list[str]:
    """The words that a batch would see."""
    batch = make_batch([_encoded(text)])
    return [batch.text(word, 1).lower() for word in range(len(batch.words))]


def make_batch(encoded: Sequence[bytes]) -> Batch:
    """The words of texts in UTF-8."""
    data = np.frombuffer(b"\n" + b"\n".join(encoded) + b"\n", dtype=np.uint8)
    is_word = np.take(_IS_WORD, data)
    starts_anew = None
    if len(data) and data.max() >= 128:
        is_word, starts_anew = _other_scripts(data, is_word)
    before = np.empty_like(is_word)
    before[0], before[1:] = False, is_word[:-1]
    starting = is_word & ~before if starts_anew is None else is_word & (~before | starts_anew)
    begins = np.flatnonzero(starting)
    # A word ends where the next byte is none of its own: a separator, or the start of another word.
    after = np.empty_like(is_word)
    after[-1] = True
    after[:-1] = ~is_word[1:] | starting[1:]
    ends = np.flatnonzero(is_word & after) + 1
    lengths = np.cumsum([len(text) + 1 for text in encoded], dtype=np.int64) if len(encoded) else np.zeros(0, np.int64)
    first_word = np.concatenate([[0], np.searchsorted(begins, lengths + 1)]).astype(np.int64)
    return Batch(data, first_word, begins, ends, _word_hashes(data, begins, ends))


def _encoded(text: str) -> bytes:
    return (text if text.isascii() else text.lower()).encode("utf-8", errors="replace")


def _word_hashes(data: Bytes, begins: Ints, ends: Ints) -> Hashes:
    if not len(begins):
        return np.zeros(0, dtype=np.uint64)
    first = int(begins[0])
    # The place in the word: counts up by one, and falls back to 0 at every beginning.
    place = np.ones(len(data) - first, dtype=np.int32)
    place[0] = 0
    place[begins[1:] - first] = 1 - np.diff(begins)
    np.cumsum(place, out=place)
    np.minimum(place, _WORD_PLACES - 1, out=place)
    place <<= 8
    place |= data[first:]
    sums = np.zeros(len(place) + 1, dtype=np.uint64)
    np.take(_PLACE_HASHES, place, mode="clip", out=sums[1:])
    np.cumsum(sums, out=sums)
    return sums[ends - first] - sums[begins - first]


def _other_scripts(data: Bytes, is_word: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which bytes belong to words, and where a word starts although there is no space: at and behind each character
    from U+3040 to U+DFFF (kana, Han, Hangul)."""
    is_word = is_word.copy()
    second = np.append(data[1:], 0)
    # U+0080 to U+00BF and U+2000 to U+2FFF are punctuation and signs, U+3000 to U+303F that of Han script.
    for lead, width in ((data == 0xC2, 2), (data == 0xE2, 3), ((data == 0xE3) & (second == 0x80), 3)):
        at = np.flatnonzero(lead)
        for offset in range(width):
            is_word[np.minimum(at + offset, len(data) - 1)] = False
    character = np.flatnonzero((data >= 0xE3) & (data <= 0xED) & is_word)
    starts = np.zeros_like(is_word)
    starts[character] = True
    starts[np.minimum(character + 3, len(data) - 1)] = True
    return is_word, starts


def _random_numbers(seed: int, size: int | tuple[int, ...]) -> Hashes:
    return np.random.default_rng(seed).integers(1, 1 << 64, size=size, dtype=np.uint64)


def _byte_table() -> npt.NDArray[np.bool_]:
    table = np.zeros(256, dtype=np.bool_)
    table[[ord(letter) for letter in re.findall(r"[0-9A-Za-z]", "".join(map(chr, range(128))))]] = True
    table[128:] = True
    return table


def _place_table() -> Hashes:
    table = _random_numbers(1, (_WORD_PLACES, 256))
    capitals = np.arange(ord("A"), ord("Z") + 1)
    table[:, capitals] = table[:, capitals + 32]
    return table.reshape(-1)


_IS_WORD = _byte_table()
_PLACE_HASHES = _place_table()
_RUN_WEIGHTS = _random_numbers(2, MAX_RUN_WORDS) | np.uint64(1)
