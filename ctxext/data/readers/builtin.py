"""Sources that every machine has: Python's standard library, its documentation topics, and generated sentences.

`python-stdlib` is the docstrings and sources of this Python's standard library, without `pydoc_data` (the evaluation's
haystack), tests and generated tables. `python-docs` is those topics: a haystack by default, training text on request.
"""

from __future__ import annotations

import ast
import importlib
import random
import sysconfig
from pathlib import Path

from ctxext.data import words
from ctxext.data.documents import Documents, Part, TextDocument
from ctxext.data.readers.paths import file_fingerprint
from ctxext.errors import ArtefactError
from ctxext.files import canonical_json, fingerprint, sha256_bytes

_FILES_A_PART = 64
# Never trained on: the evaluation's haystack, and text that teaches nothing (tests, tables, bundled wheels).
_EXCLUDED_PARTS = frozenset(
    """
    pydoc_data test tests idle_test __pycache__ site-packages dist-packages lib2to3 encodings ensurepip turtledemo
    """.split()
)
# Its docstring is the documentation topic "debugger", word for word; no other module shares 50 words with a topic.
_QUOTED_BY_THE_HAYSTACK = frozenset({"pdb.py"})


def shuffled(files: list[Path], seed: int) -> list[Path]:
    """Files in the order that `seed` gives."""
    order = list(files)
    random.Random(f"documents/{seed}").shuffle(order)
    return order


def stdlib_files() -> list[Path]:
    """The modules that are read, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _EXCLUDED_PARTS & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def stdlib_parts(seed: int) -> list[Part]:
    """Some modules a part."""
    order = shuffled(stdlib_files(), seed)
    return [
        Part(
            f"python-stdlib/{begin}",
            fingerprint([file_fingerprint(path) for path in order[begin : begin + _FILES_A_PART]]),
            tuple(str(path) for path in order[begin : begin + _FILES_A_PART]),
        )
        for begin in range(0, len(order), _FILES_A_PART)
    ]


def read_stdlib(part: Part, start: int) -> Documents:
    """Docstrings and source of each module; positions count both."""
    for number, name in enumerate(part.paths):
        if 2 * number + 2 > start:
            for place, document in enumerate(_module_documents(Path(name)), start=2 * number + 1):
                if place > start:
                    yield place, document


def _module_documents(path: Path) -> list[TextDocument]:
    """A module's docstrings as prose, then its source."""
    name = path.relative_to(sysconfig.get_paths()["stdlib"]).as_posix()
    if name in _QUOTED_BY_THE_HAYSTACK:
        return []
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return []  # lib2to3-like fixtures that are not Python 3; other sources are read strictly
    docstrings = [
        docstring
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if (docstring := ast.get_docstring(node)) and len(docstring) > 80
    ]
    documents = [TextDocument(f"{name} (docstrings)", "\n\n".join(docstrings))] if docstrings else []
    return [*documents, TextDocument(name, text)] if text.strip() else documents


def python_topics() -> list[tuple[str, str]]:
    """Name and text of Python's documentation topics, sorted by name.

    Raises:
        ArtefactError: a Python that was installed without them.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ArtefactError(
            "this Python has no documentation topics (module pydoc_data.topics)",
            where="python-docs",
            hint="Install the full standard library or choose another text.",
        ) from error
    return [(name, topics[name].strip()) for name in sorted(topics)]


def topic_parts() -> list[Part]:
    """All topics in one part."""
    return [Part("python-docs", sha256_bytes(canonical_json(python_topics()).encode())[:16])]


def read_topics(seed: int, start: int) -> Documents:
    """A topic a document, in the order that `seed` gives; positions count them."""
    topics = python_topics()
    random.Random(f"documents/{seed}").shuffle(topics)
    for number, (name, text) in enumerate(topics[start:], start=start + 1):
        if text:
            yield number, TextDocument(f"python-docs/{name}", text)


def generated_parts() -> list[Part]:
    """One part without end."""
    return [Part("generated-words", sha256_bytes(canonical_json(list(words.WORDS)).encode())[:16], endless=True)]


def read_generated(seed: int, start: int) -> Documents:
    """Documents without end; positions count them."""
    number = start
    while True:
        yield number + 1, TextDocument(f"generated-words/{number}", words.document(f"train/{seed}/{number}"))
        number += 1
