"""Sources of training text: parts that can be read alone, each a reproducible run of documents that can be resumed.

    for part in source_parts(source, seed):
        for position, document in read_part(source, part, seed, start=0, bad=bad):
            ...     # read_part(..., start=position) goes on behind this document, by a seek

What a source holds but training cannot use is counted in `BadRows`, which refuses more than the recipe allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ctxext.data.bad_rows import BadRows
from ctxext.data.documents import Documents, Message, Part, TextDocument
from ctxext.data.readers import builtin, code, json_lines, parquet, paths, text, token_arrays
from ctxext.data.readers.compressed import COMPRESSED_ENDINGS, is_compressed, plain_name
from ctxext.errors import ArtefactError
from ctxext.files import fingerprint
from ctxext.recipe.data import SourceBlock

__all__ = [
    "BadRows",
    "Message",
    "Part",
    "TextDocument",
    "iter_documents",
    "no_document_error",
    "read_part",
    "source_parts",
]

_LINE_ENDINGS = (".jsonl", ".ndjson")
_ROW_ENDINGS = (*_LINE_ENDINGS, ".json", ".parquet")
_PROSE_ENDINGS = (".txt", ".text", ".md", ".rst")
_PLAIN_ENDINGS = (*_PROSE_ENDINGS, *_LINE_ENDINGS, ".json")
_TEXT_ENDINGS = (*_PLAIN_ENDINGS, ".parquet", *(a + b for a in _PLAIN_ENDINGS for b in COMPRESSED_ENDINGS))

# Small files share a part; a long file of rows is read in several.
_SMALL_BYTES = 1 << 20
_FILES_A_PART = 256
_RANGE_BYTES = 256 << 20


def source_parts(source: SourceBlock, seed: int, bad: BadRows | None = None) -> list[Part]:
    """The parts of `source` in the order in which they are read, which `seed` gives.

    Args:
        bad: counts paths that lead nowhere; the source's own limit when left out.

    Raises:
        ArtefactError: a path or dataset that is not there.
    """
    bad = bad if bad is not None else BadRows(source.max_bad_rows)
    if source.kind == "python-stdlib":
        return builtin.stdlib_parts(seed)
    if source.kind == "python-docs":
        return builtin.topic_parts()
    if source.kind == "generated-words":
        return builtin.generated_parts()
    if source.kind == "dataset":
        from ctxext.data.readers import hub  # slow to import, and most sources need none

        return hub.dataset_parts(source, seed)
    if source.kind == "code":
        return code.code_parts(builtin.shuffled(_folders(source.paths), seed))
    endings = token_arrays.ENDINGS if source.kind == "tokens" else _TEXT_ENDINGS
    files = builtin.shuffled(paths.matching_files(source.paths, endings, bad), seed)
    return _unique(list(_file_parts(source, files)))


def read_part(source: SourceBlock, part: Part, seed: int, *, start: int = 0, bad: BadRows) -> Documents:
    """Documents of a part, each with the position behind it.

    Args:
        start: a position that reading this part gave before; goes on exactly behind it.

    Raises:
        ArtefactError: more is unusable than `bad` allows.
    """
    if source.kind == "python-stdlib":
        return builtin.read_stdlib(part, start)
    if source.kind == "python-docs":
        return builtin.read_topics(seed, start)
    if source.kind == "generated-words":
        return builtin.read_generated(seed, start)
    if source.kind == "dataset":
        from ctxext.data.readers import hub

        return hub.read_dataset(part, source, seed, start, bad)
    if source.kind == "code":
        return code.read_code(part, source.include, start, bad)
    if source.kind == "tokens":
        return token_arrays.read_tokens(part, start, bad)
    return _read_text(source, part, start, bad)


def iter_documents(source: SourceBlock, seed: int, bad: BadRows | None = None) -> Iterator[TextDocument]:
    """Documents of `source` in the order that `seed` gives (endless for generated ones).

    Raises:
        ArtefactError: a pattern that matches nothing, more unusable rows than allowed, or no document at all.
    """
    bad = bad if bad is not None else BadRows(source.max_bad_rows)
    found = False
    for part in source_parts(source, seed, bad):
        for _, document in read_part(source, part, seed, bad=bad):
            found = True
            yield document
    if not found:
        raise no_document_error(source, bad)


def no_document_error(source: SourceBlock, bad: BadRows) -> ArtefactError:
    """What a source with a weight but without any usable document is."""
    seen = "; ".join(bad.lines())
    return ArtefactError(
        f"the source (weight {source.weight:g}) has no usable document{f': {seen}' if seen else ''}",
        where=f"data.sources: {', '.join(source.paths) or source.name or source.kind}",
        hint="Correct it or take it out of data.sources.",
    )


def _read_text(source: SourceBlock, part: Part, start: int, bad: BadRows) -> Documents:
    if len(part.paths) > 1:
        return text.read_small_files(part, start, bad)
    name = plain_name(Path(part.paths[0]))
    if name.endswith(".parquet"):
        return parquet.read_parquet(part, source, start, bad)
    if name.endswith(_LINE_ENDINGS):
        return json_lines.read_json_lines(part, source, start, bad)
    if name.endswith(".json"):
        return json_lines.read_json(part, source, start, bad)
    return text.read_large_file(part, start, bad)


def _file_parts(source: SourceBlock, files: list[Path]) -> Iterator[Part]:
    """Files in their order: neighbouring small ones together, long ones alone or in ranges."""
    small: list[Path] = []
    for path in files:
        rows = source.kind == "tokens" or plain_name(path).endswith(_ROW_ENDINGS)
        size = _size(path)
        if not rows and size <= _SMALL_BYTES and not is_compressed(path):
            small.append(path)
            if len(small) < _FILES_A_PART:
                continue
        if small:
            yield _part(small)
        if small and small[-1] == path:
            small = []
            continue
        small = []
        if path.name.lower().endswith(_LINE_ENDINGS) and size > _RANGE_BYTES:
            for begin in range(0, size, _RANGE_BYTES):
                yield _part([path], begin, min(begin + _RANGE_BYTES, size))
        else:
            yield _part([path])
    if small:
        yield _part(small)


def _part(files: list[Path], begin: int = 0, end: int | None = None) -> Part:
    names = paths.short_name(files[0])
    if len(files) > 1:
        names += f" and {len(files) - 1} more"
    return Part(
        names if end is None else f"{names} from byte {begin}",
        fingerprint([*(paths.file_fingerprint(path) for path in files), begin, end]),
        tuple(str(path) for path in files),
        begin,
        end,
    )


def _unique(parts: list[Part]) -> list[Part]:
    """Parts with names that differ, also where two folders hold files of the same name."""
    seen: dict[str, int] = {}
    unique = []
    for part in parts:
        seen[part.name] = seen.get(part.name, 0) + 1
        unique.append(part if seen[part.name] == 1 else replace(part, name=f"{part.name} ({seen[part.name]})"))
    return unique


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _folders(patterns: list[str]) -> list[Path]:
    folders: list[Path] = []
    for pattern in patterns:
        found = [path for path in paths.matching_paths(pattern) if path.is_dir()]
        if not found:
            raise ArtefactError(
                "not a folder; every folder of a code source becomes one document",
                where=paths.WHERE,
                got=pattern,
                hint="Name the folder of a repository, or use kind: text for single files.",
            )
        folders += found
    return list(dict.fromkeys(folders))
