"""Text around the needles of wrong answers, for the report: rebuilt once, while the tokenizer is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxext.evaluation.arms import Arm
from ctxext.evaluation.prompt import suite_builder
from ctxext.evaluation.report import shown_samples
from ctxext.evaluation.suite import Sample, Suite
from ctxext.files import read_json, write_json_atomic

EXCERPTS_NAME = "excerpts.json"
_AROUND_TOKENS = 48


def write_excerpts(folder: Path, suite: Suite, tokenizer: Any, arms: Sequence[Arm]) -> None:
    """Store the text around the needle of every wrong answer that the report shows, by prompt hash."""
    builder = suite_builder(suite, tokenizer)
    excerpts: dict[str, str] = {}
    for arm, shown in shown_samples(arms):
        if arm.recorded or shown.prompt_sha256 in excerpts:
            continue
        prompt = builder.build(Sample(shown.cell, shown.index))
        if prompt.prompt_sha256 != shown.prompt_sha256:
            continue  # of an older evaluation in this folder; no excerpt is better than a wrong one
        start = max(prompt.needle_position - _AROUND_TOKENS, 0)
        piece = prompt.input_ids[start : prompt.needle_position + 2 * _AROUND_TOKENS]
        excerpts[shown.prompt_sha256] = tokenizer.decode(piece, skip_special_tokens=False)
    write_json_atomic(folder / EXCERPTS_NAME, excerpts)


def read_excerpts(folder: Path) -> dict[str, str]:
    """What `write_excerpts` stored in a folder; empty where it has not."""
    path = folder / EXCERPTS_NAME
    return dict(read_json(path)) if path.is_file() else {}
