"""Haystacks from files and datasets: every document once, unreadable ones refused by name, manifests true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ctxext.errors import ArtefactError, UsageError
from ctxext.evaluation.haystack import NOISE, Haystack, HaystackReader, HubDataset, TextFiles, load_haystack
from ctxext.files import shipped_directory


def reader(haystack: Haystack) -> HaystackReader:
    return HaystackReader(haystack, lambda text: list(text.encode()))


def test_text_files_and_folders_give_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder/b.md", "folder/a.txt", "folder/picture.png", "single.txt"):
        (tmp_path / name).write_text(f"Text of {name}. " * 3)
    haystack = load_haystack(TextFiles(text=[str(tmp_path / "folder"), str(tmp_path / "single.txt")]))
    assert haystack.documents is not None
    assert [document.split(". ")[0] for document in haystack.documents] == [
        f"Text of {name}" for name in ("folder/a.txt", "folder/b.md", "single.txt")
    ]
    (tmp_path / "single.txt").write_text("Other text.")
    again = load_haystack(TextFiles(text=[str(tmp_path / "folder"), str(tmp_path / "single.txt")]))
    assert again.sha256 != haystack.sha256
    assert len(reader(again).tokens("seed", 100)) == 100
    with pytest.raises(UsageError, match="never repeats"):
        reader(again).tokens("seed", 1000)


def test_unreadable_or_empty_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    for name, message in (("missing.txt", "could not read"), ("binary.txt", "could not read"), ("empty", "no text")):
        with pytest.raises(ArtefactError, match=message) as caught:
            load_haystack(TextFiles(text=[str(tmp_path / name)]))
        assert name in str(caught.value)


def test_a_dataset_gives_one_document_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    rows = [{"body": f"Row {number} says this."} for number in range(6)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    haystack = load_haystack(HubDataset(dataset=str(tmp_path / "data"), column="body", rows=4))
    assert haystack.documents == tuple(row["body"] for row in rows[:4])
    with pytest.raises(UsageError, match="unknown column") as caught:
        load_haystack(HubDataset(dataset=str(tmp_path / "data"), column="bodi"))
    assert "body" in str(caught.value)
    with pytest.raises(ArtefactError, match="could not read the dataset"):
        load_haystack(HubDataset(dataset=str(tmp_path / "nothing")))


def test_noise_is_rulers_five_sentences_over_and_over() -> None:
    text = bytes(reader(load_haystack("noise")).tokens("any", 1000)).decode()
    assert text.startswith(f"{NOISE}\n{NOISE}\n")
    assert len(set(text.split("\n")[:-1])) == 1
    assert reader(load_haystack("noise")).tokens("other", 1000) == reader(load_haystack("noise")).tokens("any", 1000)


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'generated-words'"):
        load_haystack("generated-word")


def test_manifests_describe_every_named_haystack_and_their_hashes_are_true() -> None:
    manifests = {
        path.stem: yaml.safe_load(path.read_text())
        for path in (shipped_directory("evals") / "haystacks").glob("*.yaml")
    }
    assert set(manifests) == {"python-docs", "everyday", "generated-words", "noise"}
    for name, manifest in manifests.items():
        assert {"source", "licence", "documents", "tests", "sha256"} <= set(manifest), name
        if name != "python-docs":  # differs from Python to Python; the manifest names one
            assert manifest["sha256"] == load_haystack(name).sha256
    assert set(manifests["python-docs"]["sha256"].values()) >= {"45585e6e11892129"[:16]}
