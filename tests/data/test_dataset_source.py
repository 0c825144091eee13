"""Datasets are read through Hugging Face `datasets`: rows arrive in a reproducible order, bad rows are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from ctxext.data.sources import BadRows, Message, iter_documents
from ctxext.errors import ArtefactError, UsageError
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
    with pytest.raises(ArtefactError, match=r"json/0, row 0: the row has no field 'text'; got 'fields: content'"):
        list(iter_documents(source(tmp_path / "rows.jsonl"), 0))


@pytest.mark.parametrize("content", [None, '{"text": "cut'], ids=["missing", "broken"])
def test_an_unreadable_dataset_is_one_clear_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ArtefactError, match="could not read the dataset"):
        list(iter_documents(source(path), 0))


def saved(path: Path, **fields: Any) -> SourceBlock:
    return SourceBlock(kind="dataset", name=str(path), **fields)


def test_a_saved_dataset_is_read_by_split(tmp_path: Path) -> None:
    splits = {name: Dataset.from_list([{"text": name}]) for name in ("train", "validation")}
    DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    for split in splits:
        assert [document.text for document in iter_documents(saved(tmp_path / "both", split=split), 0)] == [split]
    with pytest.raises(UsageError, match=r"both: unknown split; got 'trian'.* Did you mean 'train'"):
        list(iter_documents(saved(tmp_path / "both", split="trian"), 0))


@pytest.mark.parametrize("streaming", [True, False])
def test_bad_rows_are_counted_and_named(streaming: bool, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": None}, {"text": ""}, {"text": "b"}])
    rows = {"kind": "dataset", "name": "json", "paths": [str(tmp_path / "rows.jsonl")], "streaming": streaming}
    with pytest.raises(ArtefactError, match=r"json/0, row 1: the field 'text' holds no text; got 'null'"):
        list(iter_documents(SourceBlock.model_validate(rows), 0))
    bad = BadRows(1)
    documents = list(iter_documents(SourceBlock.model_validate(rows), 0, bad))
    assert sorted(document.text for document in documents) == ["a", "b"]
    assert (bad.num_bad, bad.left_out["no text in it"].count) == (1, 1)


def test_conversations_come_from_datasets_too(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    Dataset.from_list([{"messages": turns, "id": 1}]).save_to_disk(str(tmp_path / "chats"))
    [document] = iter_documents(saved(tmp_path / "chats", messages_field="messages"), 0)
    assert document.messages == (Message("user", "hi"), Message("assistant", "ho"))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_that_ends_early_is_noticed(streaming: bool, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": f"row {number}"} for number in range(9)])
    card = "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n"
    for promised in (9, 20):
        (folder / "README.md").write_text(f"{card}    num_examples: {promised}\n    num_bytes: 99\n---\n")
        rows = iter_documents(saved(folder, streaming=streaming), 0)
        if promised == 9:
            assert len(list(rows)) == 9
        else:
            with pytest.raises(
                ArtefactError, match=r"data: the dataset ended early; got '9 rows'|could not read the dataset"
            ):
                list(rows)


def test_a_cut_shard_is_one_clear_error(tmp_path: Path) -> None:
    for number in range(2):
        Dataset.from_list([{"text": f"row {number} {row}"} for row in range(50)]).to_parquet(
            tmp_path / f"{number}.parquet"
        )
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(whole[: len(whole) // 2])
    source = SourceBlock(kind="dataset", name="parquet", paths=[str(tmp_path / "*.parquet")])
    with pytest.raises(ArtefactError, match=r"data\.sources: parquet: could not read the dataset \(ArrowInvalid"):
        list(iter_documents(source, 0))


def test_a_name_that_is_no_folder_is_said_to_need_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ArtefactError, match=r"some/dataset: could not read .* are looked up on the Hugging Face hub"):
        list(iter_documents(SourceBlock(kind="dataset", name="some/dataset"), 0))
