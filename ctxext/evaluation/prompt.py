"""Token-exact prompts: built from ids, so that a prompt of 12,288 tokens has 12,288 tokens.

Cutting at a sentence by decoding and encoding again changes the length in more than half of all cases; here the needle
is put between two tokens of the haystack, behind the nearest one that ends a sentence or a line.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from ctxext.data.boundaries import SentenceEnds, encode_plain
from ctxext.errors import UsageError
from ctxext.evaluation.haystack import HaystackReader
from ctxext.evaluation.suite import Sample
from ctxext.evaluation.tasks.needle import Needle, make_needle
from ctxext.files import sha256_bytes


@dataclass(frozen=True)
class Prompt:
    """One sample's prompt. `needle_position` is the index of the needle's first token."""

    sample: Sample
    needle: Needle
    input_ids: list[int]
    needle_position: int
    num_needle_tokens: int
    haystack_sha256: str

    @property
    def prompt_sha256(self) -> str:
        """Identifies the prompt: equal hashes mean equal token ids."""
        return hash_ids(self.input_ids)


def hash_ids(ids: list[int]) -> str:
    """SHA-256 of a list of token ids."""
    return sha256_bytes(b"".join(token.to_bytes(4, "little") for token in ids))


class PromptBuilder:
    """Builds the prompts of a suite for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        wording: a key of `WORDINGS`.
        seed: the suite's seed.
    """

    def __init__(self, tokenizer: Any, reader: HaystackReader, wording: str, seed: int) -> None:
        self._tokenizer = tokenizer
        self._reader = reader
        self._wording = wording
        self._seed = seed
        self._sentence_ends = SentenceEnds(tokenizer)

    def build(self, sample: Sample) -> Prompt:
        """The prompt of exactly `sample.cell.length_tokens` tokens, a pure function of seed and sample.

        Raises:
            UsageError: the length leaves no room for text, or the haystack is too short.
        """
        seed = f"{self._seed}/{self._wording}/{sample.sample_id}"
        needle = make_needle(self._wording, random.Random(seed))
        intro, fact, question = (
            self._intro_ids(needle.intro),
            self._encode(needle.needle),
            self._encode(needle.question),
        )
        room = sample.cell.length_tokens - len(intro) - len(fact) - len(question)
        if room < len(fact):
            raise UsageError(
                "the length leaves no room for text around the needle",
                where=sample.sample_id,
                got=sample.cell.length_tokens,
                expected=f"at least {sample.cell.length_tokens - room + len(fact)} tokens",
            )
        hay = self._reader.tokens(f"{seed}/haystack", room)
        split = self._sentence_ends.nearest(hay, round(sample.cell.depth * len(hay)))
        input_ids = [*intro, *hay[:split], *fact, *hay[split:], *question]
        assert len(input_ids) == sample.cell.length_tokens
        return Prompt(sample, needle, input_ids, len(intro) + split, len(fact), hash_ids(hay))

    def _encode(self, text: str) -> list[int]:
        return encode_plain(self._tokenizer, text)

    def _intro_ids(self, intro: str) -> list[int]:
        # What the tokenizer puts before a text by itself (BOS for Llama, nothing for SmolLM2) belongs here, once.
        marker = self._tokenizer("a").input_ids
        plain = self._encode("a")
        start = next((i for i in range(len(marker)) if marker[i : i + len(plain)] == plain), 0)
        return [*marker[:start], *(self._encode(intro) if intro else [])]
