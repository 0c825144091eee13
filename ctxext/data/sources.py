"""Sources of training text: documents in a reproducible order.

`python-stdlib` is the text that every machine has: the docstrings and sources of this Python's standard library,
without `pydoc_data` (the evaluation's haystack), tests and generated tables.
"""

from __future__ import annotations

import ast
import glob
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset
from datasets.exceptions import DatasetsError

from ctxext.data import words
from ctxext.errors import ArtefactError
from ctxext.recipe.data import SourceBlock

_SHUFFLE_BUFFER = 1000

# Never trained on: the evaluation's haystack, and text that teaches nothing (tests, tables, bundled wheels).
_EXCLUDED_PARTS = frozenset(
    """
    pydoc_data test tests idle_test __pycache__ site-packages dist-packages lib2to3 encodings ensurepip turtledemo
    """.split()
)
# Its docstring is the documentation topic "debugger", word for word; no other module shares 50 words with a topic.
_QUOTED_BY_THE_HAYSTACK = frozenset({"pdb.py"})


@dataclass(frozen=True)
class TextDocument:
    """One source text; `origin` names it in messages, without this machine's folders."""

    origin: str
    text: str


def iter_documents(source: SourceBlock, seed: int) -> Iterator[TextDocument]:
    """Documents of `source` in the order that `seed` gives (endless for generated ones).

    Raises:
        ArtefactError: a pattern that matches nothing, or a file that is not UTF-8 text.
    """
    if source.kind == "python-stdlib":
        yield from _shuffled_files(_stdlib_files(), seed, _stdlib_documents)
    elif source.kind == "text":
        yield from _shuffled_files(_matching_files(source.paths), seed, _text_documents)
    elif source.kind == "dataset":
        yield from _dataset_documents(source, seed)
    else:
        number = 0
        while True:
            yield TextDocument(f"generated-words/{number}", words.document(f"train/{seed}/{number}"))
            number += 1


def _shuffled_files(
    files: list[Path], seed: int, read: Callable[[Path], Iterator[TextDocument]]
) -> Iterator[TextDocument]:
    order = list(files)
    random.Random(f"documents/{seed}").shuffle(order)
    for path in order:
        yield from read(path)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _EXCLUDED_PARTS & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _stdlib_documents(path: Path) -> Iterator[TextDocument]:
    """A module's docstrings as prose, then its source."""
    name = path.relative_to(sysconfig.get_paths()["stdlib"]).as_posix()
    if name in _QUOTED_BY_THE_HAYSTACK:
        return
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return  # lib2to3-like fixtures that are not Python 3; other sources are read strictly
    docstrings = [
        docstring
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if (docstring := ast.get_docstring(node)) and len(docstring) > 80
    ]
    if docstrings:
        yield TextDocument(f"{name} (docstrings)", "\n\n".join(docstrings))
    if text.strip():
        yield TextDocument(name, text)


def _matching_files(patterns: list[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        found = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
        if not found:
            raise ArtefactError("no file matches", where="data.sources.paths", got=pattern)
        files += found
    return list(dict.fromkeys(files))


def _dataset_documents(source: SourceBlock, seed: int) -> Iterator[TextDocument]:
    """Rows of a streamed dataset, in an order shuffled within a buffer, as streams allow."""
    assert source.name is not None
    try:
        rows = load_dataset(
            source.name,
            data_files=source.paths or None,
            split=source.split,
            revision=source.revision,
            streaming=True,
        ).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        for number, row in enumerate(rows):
            text = row.get(source.text_field)
            if not isinstance(text, str):
                raise ArtefactError(
                    "a row of the dataset has no text",
                    where=f"{source.name}, row {number}",
                    got=", ".join(sorted(row)),
                    expected=f"text in the field '{source.text_field}'",
                    hint="Name the right field as text_field.",
                )
            if text.strip():
                yield TextDocument(f"{source.name}/{number}", text)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ArtefactError(f"could not read the dataset ({reason})", where=f"data.sources: {source.name}") from error


def _text_documents(path: Path) -> Iterator[TextDocument]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"could not read the text ({error})", where=str(path)) from error
    if text.strip():
        yield TextDocument(path.name, text)
