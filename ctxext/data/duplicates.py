"""How much of a collection stands in it twice: exact copies, and near ones by MinHash.

Exact copies (equal words in lower case) are counted over all texts. Near copies (at least 80% of the runs of five words
in common, estimated by 128 permutations; Broder 1997, with the library datasketch) are counted inside a sample of
bounded size, since an index over everything would not fit into memory; copies of what is not in it are not seen.
Duplicated text is read more often than the mixture says, and learned by heart (Lee et al. 2022, arXiv:2107.06499).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctxext.data.runs import Hashes, batches

SIMILARITY = 0.8
MAX_NEAR_DOCUMENTS = 10_000
_SHINGLE_WORDS = 5
_NUM_PERMUTATIONS = 128
# Enough of a long document to know it by; bounds the time.
_MAX_SHINGLES = 20_000
_SAMPLE_SEED = 3
_NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Duplicates:
    """Documents that repeat an earlier one.

    Attributes:
        num_exact: documents whose words are those of an earlier document.
        exact_words: words in them.
        num_compared: documents that were compared for near copies; all of them when there are few.
        num_near: of these, documents that are near copies of an earlier one, exact ones included.
        examples: pairs (document, earlier document) of near copies that are not exact.
    """

    num_documents: int
    num_words: int
    num_exact: int
    exact_words: int
    num_compared: int
    num_near: int
    examples: tuple[tuple[int, int], ...] = ()

    @property
    def exact_share(self) -> float:
        """Of the documents."""
        return self.num_exact / max(self.num_documents, 1)

    @property
    def near_share(self) -> float:
        """Of the documents that were compared."""
        return self.num_near / max(self.num_compared, 1)

    def sentence(self) -> str:
        """Both shares in words."""
        sample = "" if self.num_compared == self.num_documents else f" (inside a sample of {self.num_compared:,})"
        return (
            f"{self.exact_share:.1%} of {self.num_documents:,} documents are exact copies of another one "
            f"({self.exact_words / max(self.num_words, 1):.1%} of the words), {self.near_share:.1%} are near or exact "
            f"copies{sample}"
        )


def find_duplicates(texts: Iterable[str], *, seed: int = 0, max_near: int = MAX_NEAR_DOCUMENTS) -> Duplicates:
    """Copies among texts, which are read once and not kept.

    Args:
        max_near: documents compared for near copies, drawn evenly from all (reservoir sampling).
    """
    # Bounded by the number of documents, not of words: eight bytes each in the set.
    rng = np.random.default_rng([seed, _SAMPLE_SEED])
    seen = set[int]()
    num_exact = exact_words = num_words = total = 0
    sample: dict[int, tuple[int, Any]] = {}
    for first, batch in batches(texts):
        (_, shingles, inside), *_ = batch.runs([_SHINGLE_WORDS])
        for number in range(len(batch.first_word) - 1):
            begin, end = (int(word) for word in batch.first_word[number : number + 2])
            whole = _whole(batch.words[begin:end])
            total, num_words = first + number + 1, num_words + end - begin
            if whole in seen:
                num_exact, exact_words = num_exact + 1, exact_words + end - begin
            seen.add(whole)
            slot = total - 1 if total <= max_near else int(rng.integers(total))
            if slot < max_near:
                own = shingles[begin:end][inside[begin:end]]
                sample[slot] = (total - 1, _sketch(own[:_MAX_SHINGLES] if len(own) else batch.words[begin:end]))
    near, examples = _near_copies(sorted(sample.values(), key=lambda entry: entry[0]))
    return Duplicates(total, num_words, num_exact, exact_words, len(sample), near, examples)


def _whole(words: Hashes) -> int:
    """One number for all words in their order."""
    place = np.arange(1, len(words) + 1, dtype=np.uint64)
    # Multiplied by an odd number that depends on the place, mixed, and summed modulo 2^64.
    mixed = (words ^ (place * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xBF58476D1CE4E5B9)
    return int(np.bitwise_xor(mixed, mixed >> np.uint64(31)).sum(dtype=np.uint64)) ^ len(words)


def _sketch(shingles: Hashes) -> Any:
    from datasketch import MinHash  # most commands need none

    sketch = MinHash(num_perm=_NUM_PERMUTATIONS, hashfunc=int)
    sketch.update_batch((np.unique(shingles) >> np.uint64(32)).tolist())
    return sketch


def _near_copies(sketches: list[tuple[int, Any]]) -> tuple[int, tuple[tuple[int, int], ...]]:
    """How many documents are like an earlier one, and a few pairs that are not equal."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=SIMILARITY, num_perm=_NUM_PERMUTATIONS)
    earlier: dict[int, Any] = {}
    near, examples = 0, list[tuple[int, int]]()
    for number, sketch in sketches:
        like = [(sketch.jaccard(earlier[other]), other) for other in index.query(sketch)]
        if like and max(like)[0] >= SIMILARITY:
            near += 1
            similarity, other = max(like)
            if similarity < 1 and len(examples) < _NUM_EXAMPLES:
                examples.append((number, other))
        index.insert(number, sketch)
        earlier[number] = sketch
    return near, tuple(examples)
