"""Tokenizer fertility: tokens per word, which says how well a tokenizer fits the text that a model shall read.

Words are counted as treebanks do, punctuation marks apart (Rust et al. 2021, arXiv:2012.15613), so that prose and code
can stand beside each other; Han characters and kana count singly. English prose has 1.0 to 1.3. Where it takes many
tokens to say a word, the same number of positions holds less text, and a window is worth less than its number says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

HIGH = 1.6
TOO_HIGH = 1.8
_SINGLE = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+|[^\w\s]")

Level = Literal["good", "high", "too high"]


@dataclass(frozen=True)
class Fertility:
    """Tokens and words of the same texts."""

    num_tokens: int
    num_words: int

    @property
    def tokens_per_word(self) -> float:
        """NaN without words."""
        return self.num_tokens / self.num_words if self.num_words else float("nan")

    @property
    def level(self) -> Level:
        """How it is to be taken."""
        if self.tokens_per_word >= TOO_HIGH:
            return "too high"
        return "high" if self.tokens_per_word >= HIGH else "good"

    def sentence(self) -> str | None:
        """What to tell people; None when there is nothing to worry about."""
        if self.level == "good":
            return None
        return (
            f"{self.tokens_per_word:.2f} tokens a word is {self.level} ({HIGH} and {TOO_HIGH} are the warning levels): "
            "this tokenizer fits this text badly, so a window of tokens holds little of it"
        )


def count_words(text: str) -> int:
    """Words and punctuation marks."""
    return sum(1 for _ in _WORD.finditer(text))


def fertility(texts: Iterable[tuple[str, int]]) -> Fertility:
    """Of texts with their numbers of tokens."""
    tokens = words = 0
    for text, num_tokens in texts:
        tokens += num_tokens
        words += count_words(text)
    return Fertility(tokens, words)
