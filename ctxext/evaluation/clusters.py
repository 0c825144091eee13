"""Which samples are independent of each other."""

from __future__ import annotations

from typing import Protocol


class AnsweredPrompt(Protocol):
    """What a stored sample says about its text."""

    @property
    def haystack_sha256(self) -> str:
        """Of the sample's haystack tokens; empty where it has none."""

    @property
    def prompt_sha256(self) -> str:
        """Of the prompt's tokens."""


def cluster_of(sample: AnsweredPrompt) -> str:
    """What a sample shares with others that are not independent of it: its haystack; itself where there is none."""
    return sample.haystack_sha256 or sample.prompt_sha256
