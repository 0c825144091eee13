"""Arrays of ids are read as they say they are, cut at their separator, and refused where they cannot be ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxext.data.readers import token_arrays
from ctxext.data.readers.token_arrays import check_ids
from ctxext.data.sources import iter_documents
from ctxext.errors import ArtefactError
from ctxext.recipe.data import SourceBlock

FLAT = [5, 6, 7, 0, 0, 9, 0]


def read(path: Path, **fields: Any) -> list[list[int]]:
    found = [d.ids for d in iter_documents(SourceBlock(kind="tokens", paths=[str(path)], **fields), 0)]
    assert all(ids is not None and ids.dtype.kind == "u" for ids in found)
    return [ids.tolist() for ids in found if ids is not None]


def write_bin(path: Path, dtype: str, header: bytes = b"", **sidecar: Any) -> Path:
    path.write_bytes(header + np.array(FLAT, dtype=dtype).tobytes())
    path.with_name(f"{path.name}.json").write_text(json.dumps({"dtype": dtype, **sidecar}))
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_every_type_is_read_from_both_kinds_of_file(dtype: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(FLAT, dtype=dtype))
    assert read(tmp_path / "a.npy") == [FLAT]
    assert read(write_bin(tmp_path / "a.bin", dtype)) == [FLAT]
    assert read(write_bin(tmp_path / "a.bin", dtype, separator=0)) == [[5, 6, 7], [9]]
    assert read(write_bin(tmp_path / "a.bin", dtype, b"\1" * 64, separator=0, offset_bytes=64)) == [[5, 6, 7], [9]]


def test_a_row_is_a_document(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.uint16).reshape(2, 3))
    assert read(tmp_path / "a.npy") == [[0, 1, 2], [3, 4, 5]]


def test_separators_are_found_wherever_the_array_is_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).integers(0, 4, 500, dtype=np.uint16)
    np.save(tmp_path / "a.npy", ids)
    (tmp_path / "a.npy.json").write_text('{"separator": 0}')
    runs = [[int(token) for token in run] for run in "".join(map(str, ids)).split("0") if run]
    for piece in (1, 3, 64, 1000):
        monkeypatch.setattr(token_arrays, "_SCANNED_AT_ONCE", piece)
        assert read(tmp_path / "a.npy") == runs


def test_an_array_without_separators_is_cut_into_what_a_window_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_arrays, "MAX_DOCUMENT_TOKENS", 4)
    np.save(tmp_path / "a.npy", np.arange(10, dtype=np.uint16))
    assert read(tmp_path / "a.npy") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


REFUSED: dict[str, tuple[Any, str]] = {
    "fractions": (np.zeros(3), "not an array .* of whole numbers; got 'float64"),
    "three dimensions": (np.zeros((1, 2, 3), dtype=np.uint16), r"not an array .*; got 'uint16 \[1, 2, 3\]'"),
    "negative": (np.array([3, -100], dtype=np.int64), "below 0 or above 32 bits; got '-100 to 3'"),
    "too large": (np.array([3, 1 << 40], dtype=np.int64), "below 0 or above 32 bits"),
    "objects": (np.array([{}, []], dtype=object), "not a NumPy array file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_ids_is_refused(name: str, tmp_path: Path) -> None:
    array, message = REFUSED[name]
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ArtefactError, match=message):
        read(tmp_path / "a.npy")


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    for data in (b"", b"text", path.read_bytes()[:-1], path.read_bytes()[:40], b"PK\x03\x04" + b"\0" * 40):
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match=r"a\.npy: not a NumPy array file, or one that is cut short"):
            read(path)


SIDECARS: dict[str, tuple[str | None, str]] = {
    "missing": (None, r"needs a file beside it that names its type; expected 'a\.bin\.json|a\.bin\.json with"),
    "without type": ("{}", "needs a file beside it"),
    "unknown type": ('{"dtype": "float32"}', r"a\.bin\.json: dtype: Input should be 'uint8', 'uint16'"),
    "unknown key": ('{"dtype": "uint16", "sep": 0}', r"a\.bin\.json: sep: Extra inputs"),
    "no JSON": ("uint16", r"a\.bin\.json:1: not valid JSON"),
    "odd size": ('{"dtype": "uint32"}', r"a\.bin: not a whole number of uint32 ids; got '14 bytes'"),
    "long header": ('{"dtype": "uint16", "offset_bytes": 100}', "not a whole number of uint16 ids; got '0 bytes'"),
}


@pytest.mark.parametrize("name", SIDECARS)
def test_raw_arrays_must_be_described_rightly(name: str, tmp_path: Path) -> None:
    sidecar, message = SIDECARS[name]
    (tmp_path / "a.bin").write_bytes(np.array(FLAT, dtype=np.uint16).tobytes())
    if sidecar is not None:
        (tmp_path / "a.bin.json").write_text(sidecar)
    with pytest.raises(ArtefactError, match=message):
        read(tmp_path / "a.bin")


def test_ids_beyond_the_vocabulary_are_named_with_their_place() -> None:
    ids = np.array([1, 2, 50_300, 60_000], dtype=np.uint16)
    check_ids(ids, 60_001, "a")
    check_ids(ids[:0], 1, "a")
    with pytest.raises(ArtefactError, match=r"a, token 3: .* got 60000; expected ids below 60,000"):
        check_ids(ids, 60_000, "a")
    with pytest.raises(ArtefactError, match=r"corpus, token 2: .* got 50300; expected ids below 49,152"):
        check_ids(ids, 49_152, "corpus")
