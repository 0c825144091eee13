"""Atomic writes, checksummed directories, safe joins, free-space checks.

A reader never sees half a file: everything is written beside its place, flushed to the disk, and renamed.
A directory is complete when its manifest is there, because the manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ctxext.errors import ArtefactError, ResourceError

MANIFEST_NAME = "manifest.json"
_PARTIAL_MARK = ".partial-"
_RETIRED_MARK = ".retired-"


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, fit for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any, *, digits: int = 16) -> str:
    """A short stable hash of a JSON-able value."""
    return sha256_bytes(canonical_json(value).encode())[:digits]


def _sync_directory(path: Path) -> None:
    # Without this the rename itself can be lost on a power cut, although both files are safe.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{_PARTIAL_MARK}{os.getpid()}-{secrets.token_hex(4)}")


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that the old content stays until the new one is complete on disk.

    Raises:
        ResourceError: the disk is full or not writable; the old file is untouched.
    """
    partial = _partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):  # where nothing can be written, there may be nothing to remove either
            partial.unlink()
        raise _disk_error("could not write", path, error) from error


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, see `write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: Path, value: Any) -> None:
    """Write indented JSON atomically, see `write_bytes_atomic`; NaN is refused."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtefactError: missing, unreadable or not JSON, with the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError("file not found", where=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"could not read the file ({error})", where=str(path)) from error
    except json.JSONDecodeError as error:
        raise ArtefactError(f"not valid JSON ({error.msg})", where=f"{path}:{error.lineno}") from error


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON line and flush it to the disk, so that a later kill cannot take it back.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    line = canonical_json(value) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as stream:
            # A kill can take the end of the last line, the newline alone included; two records never share a line.
            if stream.tell() and not _ends_with_newline(stream):
                stream.write(b"\n")
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise _disk_error("could not append to", path, error) from error


def _ends_with_newline(stream: BinaryIO) -> bool:
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"


def read_json_lines(path: Path) -> list[Any]:
    """All complete lines of a JSON-lines file; a half line at the end (a kill while writing) is moved aside.

    Raises:
        ArtefactError: a line other than the last is not JSON.
    """
    if not path.exists():
        return []
    values: list[Any] = []
    data = path.read_bytes()
    lines = data.split(b"\n")
    kept = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            kept += len(line) + 1
            continue
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if any(rest.strip() for rest in lines[number:]):
                raise ArtefactError("not valid JSON", where=f"{path}:{number}") from error
            aside = path.with_suffix(path.suffix + ".half-line")
            aside.write_bytes(line)
            write_bytes_atomic(path, data[:kept])
            break
        kept += len(line) + 1
    return values


@contextmanager
def directory_atomic(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a directory under another name and rename it into place when the block ends well.

    Yields the partial directory. On any error it is removed and `destination` stays as it was.

    Raises:
        ArtefactError: `destination` exists and `replace` is false.
    """
    if destination.exists() and not replace:
        raise ArtefactError(
            "the destination exists already", where=str(destination), hint="Choose another folder or remove it first."
        )
    partial = _partial_path(destination)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _disk_error("could not create", destination, error) from error
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        _sync_directory(partial)
        if destination.exists():
            retired = destination.with_name(f"{destination.name}{_RETIRED_MARK}{secrets.token_hex(4)}")
            os.replace(destination, retired)
            try:
                os.replace(partial, destination)
            except BaseException:
                os.replace(retired, destination)
                raise
            shutil.rmtree(retired)
        else:
            os.replace(partial, destination)
        _sync_directory(destination.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _disk_error("could not write", destination, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_partials(parent: Path) -> None:
    """Remove what killed writers left in `parent`, and put back a folder that was about to be replaced."""
    for retired in parent.glob(f"*{_RETIRED_MARK}*"):
        destination = retired.with_name(retired.name.partition(_RETIRED_MARK)[0])
        if destination.exists():
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.replace(retired, destination)
    for leftover in parent.glob(f"*{_PARTIAL_MARK}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_manifest(directory: Path, **facts: Any) -> None:
    """Write `manifest.json`: size and SHA-256 of every other file below `directory`, plus `facts`."""
    files = {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST_NAME
    }
    write_json_atomic(directory / MANIFEST_NAME, {**facts, "files": files})


def verify_manifest(directory: Path) -> dict[str, Any]:
    """Check every file of a checksummed directory and return the manifest.

    Raises:
        ArtefactError: manifest missing, or a file missing, cut short or changed.
    """
    manifest: Any = read_json(directory / MANIFEST_NAME)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or any(
        not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys() for facts in files.values()
    ):
        raise ArtefactError(
            "the manifest has no table of files with sizes and checksums", where=str(directory / MANIFEST_NAME)
        )
    for name, facts in files.items():
        file = safe_join(directory, name)
        if not file.is_file():
            raise ArtefactError("a file named in the manifest is missing", where=str(file))
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise ArtefactError(
                "the file was cut short or grew", where=str(file), got=size, expected=f"{facts['bytes']} bytes"
            )
        if sha256_file(file) != facts["sha256"]:
            raise ArtefactError("the file's checksum differs from the manifest", where=str(file))
    verified: dict[str, Any] = manifest
    return verified


def safe_join(root: Path, relative: str) -> Path:
    """`root / relative`, refused when it would leave `root`.

    Raises:
        ArtefactError: the path is absolute or climbs out of `root`.
    """
    try:
        joined = (root / relative).resolve()
        inside = joined.is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # NUL, half a surrogate pair, a loop of links
        inside = False
    if not inside:
        raise ArtefactError("the path leaves its folder", where=str(root), got=relative)
    return joined


def require_free_space(path: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse early when the disk of `path` has less than `needed_bytes` free.

    Raises:
        ResourceError: too little space, with both numbers.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ResourceError(
            f"not enough free disk space for {purpose}",
            where=str(path),
            got=format_bytes(free),
            expected=f"at least {format_bytes(needed_bytes)}",
            hint="Free some space or choose another output_dir.",
        )


def format_bytes(count: float) -> str:
    """A count of bytes for people: '1.4 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def _disk_error(what: str, path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{what} ({error.strerror or error})", where=str(path), hint="Check free space and permissions."
    )


def shipped_directory(name: str) -> Path:
    """The folder `recipes` or `evals` that ships with ctxext, in a wheel or in a source checkout.

    Raises:
        ArtefactError: the installation lacks it.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "share" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise ArtefactError(f"this installation lacks its '{name}' folder", where=str(package), hint="Reinstall ctxext.")
