"""A model file that several Python packages hold in parts, joined once into a cache.

Package indexes limit the size of a file, so a large model comes as one distribution that requires others, each with one
part: `model.gguf.part00`, `model.gguf.part01`, ... at the same place inside its own package. Only their metadata is
read; no code of theirs runs.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ctxext.errors import ArtefactError
from ctxext.files import directory_atomic, fingerprint, require_free_space


@dataclass(frozen=True, order=True)
class _Part:
    """`checksum` is what the installer recorded: SHA-256 in URL-safe base64 without padding."""

    number: int
    path: Path
    checksum: str


def joined_file(package: str, inside: str) -> Path | None:
    """The file `inside` of an import package, joined from its parts; None when nothing holds parts of that name.

    Parts are looked for in the distribution of `package` and in those that it requires. Every one is checked against
    the checksum that was recorded when it was installed.

    Raises:
        ArtefactError: a part is missing or damaged.
        ResourceError: the cache has no room.
    """
    parts, absent = _find_parts(package, inside)
    if not parts and not absent:
        return None
    numbers = [part.number for part in parts]
    if absent or numbers not in (list(range(len(parts))), list(range(1, len(parts) + 1))):
        raise ArtefactError(
            "parts of the file are not installed",
            where=f"package:{package}/{inside}",
            got=", ".join(part.path.name for part in parts) or "no part",
            hint=f"Install {', '.join(absent)}." if absent else "Reinstall the package with its dependencies.",
        )
    folder = _cache() / fingerprint([part.checksum for part in parts])
    joined = folder / Path(inside).name
    if not joined.is_file():
        require_free_space(folder, sum(part.path.stat().st_size for part in parts), f"joining {joined.name}")
        with directory_atomic(folder, replace=True) as partial:
            _join(parts, partial / joined.name)
    return joined


def _find_parts(package: str, inside: str) -> tuple[list[_Part], list[str]]:
    """The parts in the order of their numbers, and the required distributions that are not installed.

    Nothing counts as absent unless some part is there: an ordinary package may lack any optional requirement.
    """
    name = re.compile(r"[^/]+/" + re.escape(inside) + r"\.part(\d+)")
    parts, absent = [], []
    for distribution in metadata.packages_distributions().get(package, []):
        required = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in metadata.requires(distribution) or []]
        for holder in (distribution, *required):
            try:
                files = metadata.files(holder) or []
            except metadata.PackageNotFoundError:
                absent.append(holder)
                continue
            for file in files:
                match = name.fullmatch(file.as_posix())
                if match and file.hash is not None:
                    parts.append(_Part(int(match[1]), Path(str(file.locate())), file.hash.value))
    return sorted(parts), sorted(absent) if parts else []


def _join(parts: list[_Part], destination: Path) -> None:
    with destination.open("wb") as stream:
        for part in parts:
            digest = hashlib.sha256()
            with part.path.open("rb") as source:
                while piece := source.read(1 << 20):
                    digest.update(piece)
                    stream.write(piece)
            if base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=") != part.checksum:
                raise ArtefactError(
                    "the part of a model differs from what was installed",
                    where=str(part.path),
                    hint="Reinstall its package.",
                )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctxext" / "joined"
