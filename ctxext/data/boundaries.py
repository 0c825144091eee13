"""Where sentences and lines end, seen from token ids alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SentenceEnds:
    """Finds places between two tokens where text can be inserted without cutting a sentence.

    Decoding and encoding again would change the number of tokens; this never does.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def is_end(self, token: int) -> bool:
        """Whether a sentence or line may end with `token`."""
        known = self._known.get(token)
        if known is None:
            text = self._tokenizer.decode([token])
            known = text.endswith("\n") or text.rstrip(" ").endswith((".", "!", "?"))
            self._known[token] = known
        return known

    def nearest(self, ids: Sequence[int], wanted: int) -> int:
        """The insertion index nearest to `wanted` behind a sentence end; both ends of `ids` count as such."""
        # Outwards from `wanted`: a text of a million tokens is asked for a few of its sentences only.
        outwards = (place for distance in range(len(ids) + 1) for place in (wanted - distance, wanted + distance))
        return next(
            place
            for place in outwards
            if place in (0, len(ids)) or (0 < place < len(ids) and self.is_end(ids[place - 1]))
        )

    def last_before(self, ids: Sequence[int], limit: int, floor: int) -> int:
        """The last place in (floor, limit] behind a sentence end; `limit` where there is none."""
        return next((place for place in range(limit, floor, -1) if self.is_end(int(ids[place - 1]))), limit)


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def leading_marker(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text by itself: BOS for Llama, nothing for SmolLM2."""
    marked, plain = list(tokenizer("a").input_ids), encode_plain(tokenizer, "a")
    return marked[: next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)]
