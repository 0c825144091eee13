"""Files behind the paths of a recipe: names, folders and glob patterns, without loops and without duplicates."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ctxext.data.bad_rows import BadRows
from ctxext.errors import ArtefactError
from ctxext.files import fingerprint

_MAGIC = re.compile(r"[*?\[]")
_END_BYTES = 4096
WHERE = "data.sources.paths"
LINK_LEADS_NOWHERE = "a symbolic link that leads nowhere or to itself"


def matching_files(patterns: list[str], endings: tuple[str, ...], bad: BadRows) -> list[Path]:
    """Files named by `patterns`, in the order of the patterns, sorted within each.

    Args:
        endings: which files of a folder are taken; files that a pattern names are taken whatever their ending.

    Raises:
        ArtefactError: a pattern that matches nothing.
    """
    files: list[Path] = []
    for pattern in patterns:
        # A folder counts when it is named; a glob pattern means files.
        found = [
            file
            for path in matching_paths(pattern)
            if str(path) == os.path.expanduser(pattern).rstrip("/") or not path.is_dir()
            for file in _files_of(path, endings, bad)
        ]
        if not found:
            raise ArtefactError(
                "no file matches",
                where=WHERE,
                got=pattern,
                hint=f"Of a folder, files ending in {', '.join(endings)} are taken."
                if os.path.isdir(pattern)
                else None,
            )
        files += found
    return list(dict.fromkeys(files))


def matching_paths(pattern: str) -> list[Path]:
    """Existing files and folders that a name or a glob pattern means, sorted.

    Raises:
        ArtefactError: the pattern matches nothing, or is one that no file system knows.
    """
    path = Path(os.path.expanduser(pattern))
    try:
        if not _MAGIC.search(pattern) or os.path.lexists(path):
            found = [path] if os.path.lexists(path) else []
        else:
            found = sorted(_glob(path))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"the path cannot be looked up ({error})", where=WHERE, got=pattern) from error
    if not found:
        raise ArtefactError("no file matches", where=WHERE, got=pattern)
    return found


def _glob(path: Path) -> Iterator[Path]:
    """Matches of a pattern. `**` follows no links to folders, so that a loop of links ends."""
    parts = path.parts
    first = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    root = Path(*parts[:first])
    pattern = Path(*parts[first:])
    hidden_wanted = any(part.startswith(".") for part in pattern.parts)
    # A final `**` names folders alone; what people mean by it is everything below.
    for match in root.glob(str(pattern / "*" if pattern.name == "**" else pattern)):
        hidden = any(part.startswith(".") for part in match.relative_to(root).parts)
        if hidden_wanted or not hidden:
            yield match


def _files_of(path: Path, endings: tuple[str, ...], bad: BadRows) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in walk(path, bad) if file.name.lower().endswith(endings))
    elif path.is_file():
        yield path
    elif not path.exists():
        bad.refuse(str(path), LINK_LEADS_NOWHERE)
    else:
        bad.refuse(str(path), "not a regular file")


def walk(folder: Path, bad: BadRows, *, strict: bool = True) -> Iterator[Path]:
    """Regular files below `folder`, sorted; hidden ones are left alone, and no folder is entered twice.

    Args:
        strict: whether a link that leads nowhere counts as unusable, or is only left out.
    """
    trouble = bad.refuse if strict else bad.leave_out
    entered: set[tuple[int, int]] = set()

    def below(current: Path) -> Iterator[Path]:
        try:
            status = current.stat()
            names = sorted(os.listdir(current))
        except OSError as error:
            trouble(str(current), f"the folder cannot be read ({error.strerror})")
            return
        if (status.st_dev, status.st_ino) in entered:
            bad.leave_out(str(current), "a symbolic link to a folder that was read already")
            return
        entered.add((status.st_dev, status.st_ino))
        for name in names:
            path = current / name
            if name.startswith("."):
                continue
            if path.is_dir():
                yield from below(path)
            elif path.is_file():
                yield path
            elif path.is_symlink():
                trouble(str(path), LINK_LEADS_NOWHERE)

    yield from below(folder)


def file_fingerprint(path: Path) -> str:
    """Changes when the file does: size, time of change, and both ends of the content."""
    try:
        status = path.stat()
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            digest.update(stream.read(_END_BYTES))
            stream.seek(max(status.st_size - _END_BYTES, 0))
            digest.update(stream.read(_END_BYTES))
    except OSError:
        return "unreadable"  # reading it names the reason
    return fingerprint([status.st_size, status.st_mtime_ns, digest.hexdigest()])


def short_name(path: Path) -> str:
    """A file's name with its folder, which says enough without naming this machine's folders."""
    return "/".join(path.parts[-2:]) if len(path.parts) > 2 else path.name
