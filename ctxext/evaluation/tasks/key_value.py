"""Key-value retrieval: one pair of a long JSON object of random UUIDs (Liu et al. 2023, arXiv:2307.03172).

The wording is that of nelson-liu/lost-in-the-middle (prompts/kv_retrieval.prompt). Instead of a fixed number of pairs
there are as many as fit, and the asked pair stands at the cell's depth.
"""

from __future__ import annotations

import random
import uuid
from typing import ClassVar, Literal

from ctxext.evaluation.tasks.base import Draft, Item, MetricName, Task
from ctxext.evaluation.tasks.bodies import InList

_INTRO = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


class KeyValueTask(Task):
    """The value of one key of a JSON object."""

    task: Literal["key_value"]

    summary: ClassVar[str] = "read one value out of a JSON object of random keys"
    when: ClassVar[str] = "exact retrieval among thousands of alike; shows what is lost in the middle"
    source: ClassVar[str] = "Lost in the Middle (arXiv:2307.03172)"
    budget: ClassVar[int] = 48
    usual_metric: ClassVar[MetricName] = "whole_match_all"

    def draft(self, rng: random.Random, length_tokens: int, depth: float) -> Draft:
        """Keys and values are random UUIDs."""
        key, value = _uuid(rng), _uuid(rng)
        return Draft(
            intro=_INTRO,
            question=f'\n\nKey: "{key}"',
            answer_prefix="\nCorresponding value:",
            body=InList(
                items=(Item(f'"{key}": "{value}"', depth),),
                filler=lambda filler_rng: f'"{_uuid(filler_rng)}": "{_uuid(filler_rng)}"',
                separator=",\n ",
                opening="{",
                closing="}",
            ),
            answers=(value,),
            key=key,
        )
