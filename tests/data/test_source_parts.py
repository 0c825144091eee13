"""Every source can be left behind any document and taken up again exactly there, also in another process's order."""

from __future__ import annotations

import pickle
import shutil
from itertools import islice
from pathlib import Path

import pytest
from datasets import Dataset
from made_sources import MAKERS, json_lines, rows, texts

from ctxext.data import sources
from ctxext.data.readers import hub
from ctxext.data.readers import json_lines as json_lines_reader
from ctxext.data.readers import text as text_reader
from ctxext.data.sources import BadRows, Part, TextDocument, iter_documents, read_part, source_parts
from ctxext.recipe.data import SourceBlock

MOST = 60


def read(source: SourceBlock, part: Part, seed: int = 0, start: int = 0) -> list[tuple[int, TextDocument]]:
    most = 8 if source.kind == "python-stdlib" else MOST
    return list(islice(read_part(source, part, seed, start=start, bad=BadRows()), most))


def content(documents: list[tuple[int, TextDocument]]) -> list[tuple[int, str, str, object]]:
    return [(at, d.origin, d.text, None if d.ids is None else d.ids.tolist()) for at, d in documents]


@pytest.mark.parametrize("kind", MAKERS)
def test_reading_goes_on_exactly_behind_any_document(kind: str, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path)
    compared = 0
    for part in source_parts(source, 3)[:3]:
        whole = content(read(source, part, 3))
        assert [at for at, *_ in whole] == sorted({at for at, *_ in whole})
        for count in range(1, min(len(whole), 12) + 1):
            again = content(read(source, part, 3, start=whole[count - 1][0]))
            assert again[: len(whole) - count] == whole[count:]
            compared += 1
    print(f"{kind}: {compared} places")
    assert compared >= 3


@pytest.mark.parametrize("kind", MAKERS)
def test_parts_in_a_row_are_the_source(kind: str, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path)
    parts = source_parts(source, 1)[: 1 if kind == "python-stdlib" else None]
    chained = [document for part in parts for _, document in read(source, part, 1)]
    assert [d.origin for d in islice(iter_documents(source, 1), len(chained))] == [d.origin for d in chained]


@pytest.mark.parametrize("kind", MAKERS)
def test_parts_are_the_same_every_time_and_travel_between_processes(kind: str, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path)
    parts = source_parts(source, 5)
    assert source_parts(source, 5) == parts == pickle.loads(pickle.dumps(parts))
    assert len({part.name for part in parts}) == len(parts)
    assert not any(str(tmp_path) in part.name for part in parts)
    documents = [document for part in parts[:4] for _, document in read(source, part, 5)]
    assert not any(str(tmp_path) in document.origin for document in documents)
    assert len({document.origin for document in documents}) == len(documents)


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.zst", "json", "parquet", "streamed dataset", "saved dataset"])
def test_every_row_arrives_once_whatever_the_seed(kind: str, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path)
    orders = [[document.text for document in iter_documents(source, seed)] for seed in range(2)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert len(set(orders[0])) == len(orders[0]) in (9, 27, 50)


@pytest.mark.parametrize("kind", ["text", "streamed dataset", "saved dataset", "code", "python-docs"])
def test_the_seed_decides_the_order(kind: str, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path)
    orders = [[d.origin for d in islice(iter_documents(source, seed), MOST)] for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert orders[2] != orders[0] or orders[3] != orders[0]


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "parquet", "code", "streamed dataset", "saved dataset"])
def test_a_changed_source_has_another_fingerprint(kind: str, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path)
    before = [part.fingerprint for part in source_parts(source, 0)]
    assert [part.fingerprint for part in source_parts(source, 0)] == before
    if kind == "saved dataset":
        shutil.rmtree(tmp_path / "saved")
        Dataset.from_list(rows(51)[1:]).save_to_disk(str(tmp_path / "saved"))
    else:
        changed = next(path for path in sorted(tmp_path.rglob("*.*")) if path.is_file() and path.suffix != ".png")
        changed.write_bytes(changed.read_bytes() + b"\n#")
    assert [part.fingerprint for part in source_parts(source, 0)] != before


def test_a_long_file_of_rows_is_read_in_ranges_that_share_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(json_lines(rows(40)))
    source = SourceBlock(kind="text", paths=[str(tmp_path / "rows.jsonl")])
    whole = list(iter_documents(source, 0))
    for range_bytes in (1, 2, 37, 64, 500):
        monkeypatch.setattr(sources, "_RANGE_BYTES", range_bytes)
        parts = source_parts(source, 0)
        assert len(parts) > 1
        assert [document for part in parts for _, document in read(source, part)] == whole


@pytest.mark.parametrize("size", [8, 9, 10, 25, 64])
def test_a_very_long_text_is_cut_where_a_line_or_a_character_ends(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_reader, "MAX_PIECE_BYTES", size)
    text = "".join(texts(9)) + "ä€𝄞" * 30 + "\n" + "\n".join(texts(5))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    source = SourceBlock(kind="text", paths=[str(tmp_path / "long.txt")])
    [part] = source_parts(source, 0)
    pieces = read(source, part)
    assert len(pieces) > 3
    # Pieces of nothing but space are no documents; everything else arrives.
    assert "".join("".join(document.text for _, document in pieces).split()) == "".join(text.split())
    for at, _ in pieces:
        assert content(read(source, part, start=at)) == [piece for piece in content(pieces) if piece[0] > at]


def test_many_small_files_share_a_part_and_long_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_FILES_A_PART", 4)
    monkeypatch.setattr(sources, "_SMALL_BYTES", 100)
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "long.txt").write_text("word " * 100)
    source = SourceBlock(kind="text", paths=[str(tmp_path)])
    parts = source_parts(source, 0)
    assert sum(len(part.paths) for part in parts) == 11
    assert max(len(part.paths) for part in parts) == 4
    assert [len(part.paths) for part in parts if str(tmp_path / "long.txt") in part.paths] == [1]
    assert len(list(iter_documents(source, 0))) == 11


def test_blocks_of_streamed_rows_are_shuffled_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BLOCK_ROWS", 8)
    (tmp_path / "rows.jsonl").write_bytes(json_lines([{"text": str(number)} for number in range(30)]))
    source = SourceBlock(kind="dataset", name="json", paths=[str(tmp_path / "rows.jsonl")])
    [part] = source_parts(source, 0)
    whole = read(source, part)
    order = [int(document.text) for _, document in whole]
    assert order != list(range(30))
    assert [sorted(order[begin : begin + 8]) for begin in range(0, 30, 8)] == [
        list(range(begin, min(begin + 8, 30))) for begin in range(0, 30, 8)
    ]
    within = [[number % 8 for number in order[begin : begin + 8]] for begin in range(0, 24, 8)]
    assert len({tuple(block) for block in within}) == 3  # each in an order of its own
    for count in (1, 7, 8, 9, 16, 29):
        assert read(source, part, start=whole[count - 1][0]) == whole[count:]


def test_a_json_file_may_hold_a_list_one_object_or_lines(tmp_path: Path) -> None:
    forms = {
        "list.json": b'[{"text": "a"}, {"text": "b"}]',
        "spread.json": b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n',
        "one.json": b'{\n "text": "a b"\n}',
        "lines.json": b'{"text": "a"}\n{"text": "b"}\n',
        "marked.json": b'\xef\xbb\xbf[{"text": "a"}, {"text": "b"}]',
    }
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        source = SourceBlock(kind="text", paths=[str(tmp_path / name)])
        assert [d.text for d in iter_documents(source, 0)] in (["a", "b"], ["a b"]), name


def test_a_list_that_memory_should_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines_reader, "MAX_LIST_BYTES", 10)
    (tmp_path / "rows.json").write_bytes(b'[{"text": "a"}, {"text": "b"}]')
    bad = BadRows(1)
    source = SourceBlock(kind="text", paths=[str(tmp_path / "rows.json")])
    [part] = source_parts(source, 0)
    assert list(read_part(source, part, 0, bad=bad)) == []
    assert "more than 10 B" in next(iter(bad.bad))
