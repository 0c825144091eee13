"""Which samples are independent of each other.

Prompts about one text rise and fall together, so they form a cluster, whatever else they hide in it. RULER's noise is
the exception: it is no draw from the texts of the world but a constant of the task, the same in every prompt. There
the draws are key, value and place, prompts with needles of their own are independent, and what is found holds for that
one text. Samples that move one needle through the noise (paired haystacks) remain a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

NOISE_FACT = "haystack"
# A fingerprint of all needles of a text whose needles are asked for in turn.
NEEDLES_FACT = "needles"


class AnsweredPrompt(Protocol):
    """What a stored sample says about its text."""

    @property
    def haystack_sha256(self) -> str:
        """Of the sample's haystack tokens; empty where it has none."""

    @property
    def prompt_sha256(self) -> str:
        """Of the prompt's tokens."""

    @property
    def key(self) -> str:
        """What the question names."""

    @property
    def expected(self) -> str:
        """The expected answers."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What else was recorded; `haystack` is "noise" where the text is RULER's."""


def is_noise(sample: AnsweredPrompt) -> bool:
    """Whether the sample's text is repeated noise, by its own record."""
    return bool(sample.facts.get(NOISE_FACT) == "noise")


def cluster_of(sample: AnsweredPrompt) -> str:
    """What a sample shares with others that are not independent of it: its haystack; in noise, its needle; itself
    where there is neither."""
    if is_noise(sample) and NEEDLES_FACT in sample.facts:
        return f"noise/{sample.facts[NEEDLES_FACT]}"
    if is_noise(sample):
        return f"noise/{sample.key}/{sample.expected}"
    return sample.haystack_sha256 or sample.prompt_sha256
