"""A model in parts is joined from installed packages, once and checked; nothing of theirs is imported."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from ctxext.errors import ArtefactError
from ctxext.model.package import joined_file

FILE = "data/model.gguf"
PARTS = [b"GGUF" + bytes(range(256)) * 5000, b"middle", b"end"]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty site-packages and an empty cache."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def install(site: Path, name: str, files: Mapping[str, bytes], requires: list[str] = []) -> None:  # noqa: B006
    """What an installer leaves: the package, METADATA and a RECORD with checksums."""
    files = {"__init__.py": b"raise AssertionError('imported')", **files}
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    lines = [f"Requires-Dist: {line}" for line in requires]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *lines]))
    (info / "top_level.txt").write_text(name)
    record = []
    for inside, data in files.items():
        path = site / name / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        record.append(f"{name}/{inside},sha256={digest},{len(data)}")
    (info / "RECORD").write_text("\n".join(record))


def install_all(site: Path, skip: int | None = None, first: int = 0) -> None:
    install(site, "ctxext_parts", {}, [f"ctxext-parts-p{n}==1.0" for n in range(len(PARTS))])
    for number, data in enumerate(PARTS):
        if number != skip:
            install(site, f"ctxext_parts_p{number}", {f"{FILE}.part{number + first:02d}": data})


@pytest.mark.parametrize("first", [0, 1])
def test_parts_are_joined_in_order_and_once(site: Path, first: int) -> None:
    install_all(site, first=first)
    joined = joined_file("ctxext_parts", FILE)
    assert joined is not None
    assert joined.name == "model.gguf"
    assert joined.read_bytes() == b"".join(PARTS)
    before = joined.stat().st_mtime_ns
    assert joined_file("ctxext_parts", FILE) == joined
    assert joined.stat().st_mtime_ns == before
    assert len(list(joined.parent.parent.iterdir())) == 1


def test_other_names_are_left_to_others(site: Path) -> None:
    install_all(site)
    install(site, "ctxext_whole", {FILE: b"whole"}, ["ctxext-optional-that-nobody-has; extra == 'x'"])
    assert joined_file("ctxext_parts", "data/other.gguf") is None
    assert joined_file("ctxext_parts", "model.gguf") is None
    assert joined_file("ctxext_whole", FILE) is None
    assert joined_file("ctxext_nothing", FILE) is None


@pytest.mark.parametrize("skip", range(len(PARTS)))
def test_an_absent_part_is_named(site: Path, skip: int) -> None:
    install_all(site, skip=skip)
    with pytest.raises(ArtefactError, match=f"parts of the file are not installed.*ctxext-parts-p{skip}"):
        joined_file("ctxext_parts", FILE)


def test_a_gap_in_the_numbers_is_refused(site: Path) -> None:
    install(site, "ctxext_parts", {f"{FILE}.part00": b"a", f"{FILE}.part02": b"c"})
    with pytest.raises(ArtefactError, match=r"not installed; got 'model\.gguf\.part00, model\.gguf\.part02'"):
        joined_file("ctxext_parts", FILE)


def test_a_damaged_part_leaves_nothing_behind(site: Path) -> None:
    install_all(site)
    damaged = site / "ctxext_parts_p1" / f"{FILE}.part01"
    damaged.write_bytes(b"muddle")
    with pytest.raises(ArtefactError, match="differs from what was installed"):
        joined_file("ctxext_parts", FILE)
    damaged.write_bytes(PARTS[1])
    joined = joined_file("ctxext_parts", FILE)
    assert joined is not None
    assert joined.read_bytes() == b"".join(PARTS)
    assert len(list(joined.parent.parent.iterdir())) == 1
