"""Datasets are read through Hugging Face `datasets`: rows arrive in a reproducible order, bad rows are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctxext.data.sources import iter_documents
from ctxext.errors import ArtefactError
from ctxext.recipe.data import SourceBlock


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def source(path: Path, **fields: str) -> SourceBlock:
    return SourceBlock(kind="dataset", name="json", paths=[str(path)], **fields)  # type: ignore[arg-type]


def test_every_row_arrives_once_in_an_order_that_the_seed_decides(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(30)])
    first, again, other = (
        [document.text for document in iter_documents(source(tmp_path / "rows.jsonl"), seed)] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert sorted(first) == sorted(f"row {number}" for number in range(30))


def test_a_row_without_text_is_named_with_the_fields_it_has(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"content": "a"}])
    with pytest.raises(ArtefactError, match=r"row 0: .* got 'content'; expected text in the field 'text'"):
        list(iter_documents(source(tmp_path / "rows.jsonl"), 0))


@pytest.mark.parametrize("content", [None, '{"text": "cut'], ids=["missing", "broken"])
def test_an_unreadable_dataset_is_one_clear_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ArtefactError, match="could not read the dataset"):
        list(iter_documents(source(path), 0))
