"""A suite made tiny: every task once, on a short prompt."""

from __future__ import annotations

from typing import Any

from ctxext.evaluation.suite import Suite

_PROMPT_TOKENS = 512
_TEXT_TOKENS = 128


def smoke_suite(suite: Suite) -> Suite:
    """The suite's tasks, wordings and haystacks, with one short prompt each and short texts for the perplexity."""
    lengths = [row.length for row in suite.grid if isinstance(row.length, int)]
    row = {"length": min([_PROMPT_TOKENS, *lengths]), "depths": [suite.grid[0].depths[0]], "samples": 1}
    values: dict[str, Any] = suite.model_dump(mode="json") | {"grid": [row]}
    for task in values.get("tasks") or []:
        task.pop("grid", None)
    for text in values.get("perplexity") or []:
        windows = {"window": _TEXT_TOKENS // 2, "stride": _TEXT_TOKENS // 4} if text.get("window") else {}
        text |= {"documents": 1, "length": _TEXT_TOKENS, **windows}
    return Suite.model_validate(values)
