"""Nothing on disk is ever half written, and what was damaged afterwards is noticed."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import file_size_limit

from ctxext import files
from ctxext.errors import ArtefactError, ResourceError, exit_code_of
from ctxext.files import (
    append_json_line,
    canonical_json,
    directory_atomic,
    fingerprint,
    format_bytes,
    read_json,
    read_json_lines,
    remove_partials,
    require_free_space,
    safe_join,
    sha256_bytes,
    sha256_file,
    verify_manifest,
    write_bytes_atomic,
    write_json_atomic,
    write_manifest,
    write_text_atomic,
)


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# --- single files ---


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_text_atomic(path, "old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(ResourceError, match="No space left") as caught:
        write_text_atomic(path, "new and longer")
    assert exit_code_of(caught.value) == 4
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.json"]


def test_a_write_that_the_kernel_cuts_short_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_bytes_atomic(path, b"old")
    with file_size_limit(1000), pytest.raises(ResourceError, match="could not write"):
        write_bytes_atomic(path, b"x" * 100_000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_an_unwritable_place_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "below.json", tmp_path / ("x" * 300)):
        with pytest.raises(ResourceError, match="could not write"):
            write_text_atomic(path, "text")
    assert names(tmp_path) == ["file"]


def test_writing_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    for value in ({"x": 1}, {"ü": [1.5, None, "中"]}):
        write_json_atomic(path, value)
        assert read_json(path) == value
    assert names(path.parent) == ["file.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_json_lacks_are_never_written(value: float, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"loss": value})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "where"), [(b'{"a": 1,\n}', r"bad\.json:2"), (b"\xff\xfe", r"bad\.json"), (None, "not found")]
)
def test_unreadable_json_is_an_artefact_error(content: bytes | None, where: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtefactError, match=where):
        read_json(path)


def test_equal_values_have_equal_fingerprints() -> None:
    assert canonical_json({"b": 1, "a": [1.0, "ü"]}) == '{"a":[1.0,"ü"],"b":1}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint({}, digits=10)) == 10


# --- JSON lines ---


def test_appended_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lines.jsonl"
    values = [{"n": number, "text": "ä\n"} for number in range(5)]
    for value in values:
        append_json_line(path, value)
    assert read_json_lines(path) == values
    assert read_json_lines(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_half_line_is_set_aside_and_the_rest_is_kept(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for number in range(3):
        append_json_line(path, {"n": number, "text": "äöü"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = [{"n": number, "text": "äöü"} for number in range(3 if cut == 1 else 2)]
    assert read_json_lines(path) == kept
    append_json_line(path, {"n": 9})
    assert read_json_lines(path) == [*kept, {"n": 9}]
    if cut > 1:
        half = whole.splitlines()[2][: 1 - cut]
        assert (tmp_path / "lines.jsonl.half-line").read_bytes() == half


def test_a_broken_line_in_the_middle_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(ArtefactError, match=r"lines\.jsonl:2"):
        read_json_lines(path)
    assert path.read_text() == '{"n": 1}\n{"n": \n{"n": 3}\n'


def test_empty_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('\n{"n": 1}\n\n{"n": 2}\n\n')
    assert read_json_lines(path) == [{"n": 1}, {"n": 2}]


def test_a_full_disk_while_appending_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ResourceError, match="could not append"):
        append_json_line(tmp_path / "lines.jsonl", {})


# --- folders ---


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "a.txt").write_text("new")
    (folder / "inner" / "b.txt").write_text("new")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    destination = tmp_path / "made"
    with directory_atomic(destination) as partial:
        fill(partial)
        assert not destination.exists()
    assert names(tmp_path) == ["a.txt", "b.txt", "inner", "made"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("replace", [True, False])
def test_a_failed_folder_leaves_nothing_behind(error: BaseException, replace: bool, tmp_path: Path) -> None:
    destination = tmp_path / "made"
    if replace:
        destination.mkdir()
        (destination / "old.txt").write_text("old")
    before = names(tmp_path)
    expected = ResourceError if isinstance(error, OSError) else type(error)

    def write() -> None:
        with directory_atomic(destination, replace=replace) as partial:
            fill(partial)
            raise error

    with pytest.raises(expected):
        write()
    assert names(tmp_path) == before


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failed_exchange_leaves_the_old_folder(
    failing_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "made"
    destination.mkdir()
    (destination / "old.txt").write_text("old")
    real_replace: Callable[..., None] = os.replace
    num_calls = 0

    def failing(source: Path, target: Path) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == failing_call:
            full_disk()
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ResourceError), directory_atomic(destination, replace=True) as partial:
        fill(partial)
    assert names(tmp_path) == ["made", "old.txt"]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    destination = tmp_path / "made"
    with directory_atomic(destination) as partial:
        (partial / "one.txt").write_text("1")
    with pytest.raises(ArtefactError, match="exists already"), directory_atomic(destination):
        pass
    with directory_atomic(destination, replace=True) as partial:
        (partial / "two.txt").write_text("2")
    assert names(tmp_path) == ["made", "two.txt"]


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = tmp_path / "made"
    destination.mkdir()
    (destination / "old.txt").write_text("old")
    real_replace: Callable[..., None] = os.replace
    killed = False

    def killing(source: Path, target: Path) -> None:
        nonlocal killed
        if killed:
            raise SystemExit
        killed = True
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", killing)
    with pytest.raises(SystemExit), directory_atomic(destination, replace=True) as partial:
        fill(partial)
    monkeypatch.undo()
    assert not destination.exists()
    remove_partials(tmp_path)
    assert names(tmp_path) == ["made", "old.txt"]


def test_a_retired_folder_goes_when_its_successor_is_there(tmp_path: Path) -> None:
    for name in ("made", "made.retired-ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    remove_partials(tmp_path)
    assert names(tmp_path) == ["made", "made.txt"]


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "kept.txt", "kept")
    (tmp_path / "made.partial-1-ab").mkdir()
    (tmp_path / "made.partial-1-ab" / "half.txt").write_text("half")
    (tmp_path / "file.partial-2-cd").write_text("half")
    remove_partials(tmp_path)
    assert names(tmp_path) == ["kept.txt"]


# --- manifests ---


@pytest.fixture
def checked(tmp_path: Path) -> Path:
    folder = tmp_path / "checked"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "inner" / "config.json").write_text("{}")
    write_manifest(folder, step=7)
    return folder


def test_an_intact_folder_passes_and_returns_its_facts(checked: Path) -> None:
    manifest = verify_manifest(checked)
    assert manifest["step"] == 7
    assert set(manifest["files"]) == {"weights.bin", "inner/config.json"}
    assert manifest["files"]["weights.bin"]["sha256"] == sha256_bytes(bytes(range(256)) * 40)


def cut_short(folder: Path) -> None:
    os.truncate(folder / "weights.bin", 100)


def grown(folder: Path) -> None:
    with (folder / "weights.bin").open("ab") as stream:
        stream.write(b"x")


def flipped_bit(folder: Path) -> None:
    data = bytearray((folder / "weights.bin").read_bytes())
    data[5000] ^= 1
    (folder / "weights.bin").write_bytes(data)


def removed(folder: Path) -> None:
    (folder / "inner" / "config.json").unlink()


def folder_for_file(folder: Path) -> None:
    removed(folder)
    (folder / "inner" / "config.json").mkdir()


def without_manifest(folder: Path) -> None:
    (folder / files.MANIFEST_NAME).unlink()


def half_manifest(folder: Path) -> None:
    os.truncate(folder / files.MANIFEST_NAME, 60)


def rewritten(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / files.MANIFEST_NAME).write_text(json.dumps({"step": 7, **changes}))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut_short, "cut short or grew; got 100; expected 10240 bytes"),
    "grown": (grown, "cut short or grew"),
    "one flipped bit": (flipped_bit, "checksum differs"),
    "a missing file": (removed, r"config\.json: a file named in the manifest is missing"),
    "a folder in a file's place": (folder_for_file, "missing"),
    "no manifest": (without_manifest, "not found"),
    "half a manifest": (half_manifest, "not valid JSON"),
    "no files in the manifest": (rewritten(), "no table of files"),
    "a manifest that is a list": (lambda folder: (folder / files.MANIFEST_NAME).write_text("[]") and None, "no table"),
    "a path that climbs out": (rewritten(files={"../x": {"bytes": 0, "sha256": ""}}), "leaves its folder"),
    "an impossible path": (rewritten(files={"x\0": {"bytes": 0, "sha256": ""}}), "leaves its folder"),
    "no checksum": (rewritten(files={"weights.bin": {"bytes": 0}}), "no table of files"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_noticed(damage: Callable[[Path], None], message: str, checked: Path) -> None:
    damage(checked)
    with pytest.raises(ArtefactError, match=message):
        verify_manifest(checked)


def test_file_hashes_do_not_depend_on_the_reading(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 7)
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_bytes(data)


# --- paths and space ---


@pytest.mark.parametrize("relative", ["a", "a/b", "./a", "a/../b", ""])
def test_paths_inside_are_joined(relative: str, tmp_path: Path) -> None:
    assert safe_join(tmp_path, relative) == (tmp_path / relative).resolve()


@pytest.mark.parametrize("relative", ["..", "../x", "a/../../x", "/etc/passwd", "/", "a\0b", "link/x"])
def test_paths_that_leave_are_refused(relative: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ArtefactError, match="leaves its folder"):
        safe_join(root, relative)


def test_a_neighbour_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root-2").mkdir()
    with pytest.raises(ArtefactError):
        safe_join(tmp_path / "root", "../root-2")


def test_missing_space_is_said_with_both_numbers(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet" / "there", 1, "a test")
    with pytest.raises(ResourceError, match=r"for a test; got '.*B'; expected at least 909494\.7 TiB|at least .*GiB"):
        require_free_space(tmp_path, 10**18, "a test")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_sizes_are_written_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text
