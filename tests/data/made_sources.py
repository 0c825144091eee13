"""Small sources of every kind, written to a folder; what the tests of readers and of resuming have in common."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ctxext.recipe.data import SourceBlock

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
}


def texts(count: int) -> list[str]:
    """Texts that differ, some of several lines."""
    return [f"text {number}\nof ä source" + " word" * (number % 7) for number in range(count)]


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def rows(count: int) -> list[dict[str, str]]:
    return [{"text": text} for text in texts(count)]


def _text_folder(folder: Path) -> SourceBlock:
    for number, text in enumerate(texts(9)):
        (folder / f"{number}.{('txt', 'md', 'rst')[number % 3]}").write_text(text, encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\x00")
    return SourceBlock(kind="text", paths=[str(folder)])


def _lines(ending: str) -> Callable[[Path], SourceBlock]:
    def make(folder: Path) -> SourceBlock:
        (folder / f"rows.jsonl{ending}").write_bytes(COMPRESS[ending](json_lines(rows(9))))
        return SourceBlock(kind="text", paths=[str(folder / "*.jsonl*")])

    return make


def _list(folder: Path) -> SourceBlock:
    (folder / "rows.json").write_text(json.dumps(rows(9), indent=1))
    return SourceBlock(kind="text", paths=[str(folder / "rows.json")])


def _parquet(folder: Path) -> SourceBlock:
    table = pa.Table.from_pylist([{"id": 1, **row} for row in rows(50)])
    pq.write_table(table, folder / "rows.parquet", row_group_size=20)
    return SourceBlock(kind="text", paths=[str(folder / "rows.parquet")])


def _repositories(folder: Path) -> SourceBlock:
    for name in ("one", "two", "three"):
        (folder / name).mkdir()
        (folder / name / "main.py").write_text(f"print('{name}')\n")
    return SourceBlock(kind="code", paths=[str(folder / "*")])


def _saved(folder: Path) -> SourceBlock:
    Dataset.from_list(rows(50)).save_to_disk(str(folder / "saved"))
    return SourceBlock(kind="dataset", name=str(folder / "saved"))


def _streamed(folder: Path) -> SourceBlock:
    for shard in range(3):
        (folder / f"{shard}.jsonl").write_bytes(json_lines([{"text": f"shard {shard}: {row}"} for row in texts(9)]))
    return SourceBlock(kind="dataset", name="json", paths=[str(folder / "*.jsonl")])


def _npy(folder: Path) -> SourceBlock:
    np.save(folder / "ids.npy", np.array([5, 6, 7, 0, 8, 9, 0, 0, 4, 4, 4], dtype=np.uint16))
    (folder / "ids.npy.json").write_text('{"separator": 0}')
    return SourceBlock(kind="tokens", paths=[str(folder / "ids.npy")])


def _generated(folder: Path) -> SourceBlock:
    return SourceBlock(kind="generated-words")


MAKERS: dict[str, Callable[[Path], SourceBlock]] = {
    "text": _text_folder,
    **{f"jsonl{ending}": _lines(ending) for ending in COMPRESS},
    "json": _list,
    "parquet": _parquet,
    "code": _repositories,
    "saved dataset": _saved,
    "streamed dataset": _streamed,
    "tokens": _npy,
    "python-stdlib": lambda folder: SourceBlock(kind="python-stdlib"),
    "python-docs": lambda folder: SourceBlock(kind="python-docs"),
    "generated-words": _generated,
}
