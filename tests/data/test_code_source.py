"""A repository becomes one document in which what is imported stands before what imports it."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxext.data.readers import code
from ctxext.data.readers.code import SEPARATOR, understandable_order
from ctxext.data.sources import BadRows, iter_documents
from ctxext.errors import ArtefactError
from ctxext.recipe.data import SourceBlock

FILES = {
    "README.md": "# A tool",
    "pyproject.toml": "[project]",
    "src/tool/__init__.py": "from tool.api import run\n",
    "src/tool/api.py": "from . import deep\nfrom .deep.core import Core\nimport os\n",
    "src/tool/deep/__init__.py": "",
    "src/tool/deep/core.py": "import json\nfrom ..base import Base\n",
    "src/tool/base.py": "class Base: ...\n",
    "docs/README.md": "later",
    "docs/guide.rst": "a guide",
    "lib.c": "int main;",
}


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def read(root: Path, include: list[str] | None = None) -> tuple[list[str], BadRows]:
    bad = BadRows()
    source = SourceBlock(kind="code", paths=[str(root)], include=include or [])
    return [document.text for document in iter_documents(source, 0, bad)], bad


def order_in(text: str) -> list[str]:
    return [line[4:-4] for line in text.splitlines() if line.startswith("=== ") and line.endswith(" ===")]


def test_a_folder_is_one_document_with_the_path_before_every_file(tmp_path: Path) -> None:
    write(tmp_path / "repo", dict(FILES))
    [text], bad = read(tmp_path / "repo")
    order = order_in(text)
    assert order[0] == "README.md"
    assert sorted(order) == sorted(name for name, content in FILES.items() if content)
    assert str(tmp_path) not in text
    for name, content in FILES.items():
        if content:
            assert SEPARATOR.format(path=name) + content.rstrip() + "\n" in text
    place = order.index
    assert place("src/tool/base.py") < place("src/tool/deep/core.py") < place("src/tool/api.py")
    assert place("src/tool/api.py") < place("src/tool/__init__.py")
    assert bad.facts()["left_out"]["no text in it"]["count"] == 1


def test_the_order_of_files_on_the_disk_does_not_matter() -> None:
    names = ["b.py", "a.py", "c.py", "README.md"]
    texts = {"b.py": "import c", "a.py": "import b", "c.py": "", "README.md": ""}
    orders = {tuple(understandable_order({name: texts[name] for name in chosen})) for chosen in permutations(names)}
    assert orders == {("README.md", "c.py", "b.py", "a.py")}


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.integers(0, 12), st.sets(st.integers(0, 12)), max_size=13))
def test_imported_files_come_first_unless_they_import_each_other(graph: dict[int, set[int]]) -> None:
    texts = {f"m{n}.py": "".join(f"import m{other}\n" for other in sorted(others)) for n, others in graph.items()}
    order = understandable_order(texts)
    assert sorted(order) == sorted(texts)
    reached: dict[int, set[int]] = {n: {other for other in others if other in graph} for n, others in graph.items()}
    for middle in graph:
        for n in graph:
            if middle in reached[n]:
                reached[n] |= reached[middle]
    for n, others in graph.items():
        for other in others & set(graph):
            if n not in reached[other]:
                assert order.index(f"m{other}.py") < order.index(f"m{n}.py")


@pytest.mark.parametrize(
    ("prefix", "package"),
    [("", "tool"), ("tool/", None), ("src/tool/", None), ("a/b/python/tool/", None)],
    ids=["the folder is the package", "flat", "src", "deep"],
)
def test_imports_are_followed_wherever_the_package_lies(prefix: str, package: str | None) -> None:
    texts = {
        f"{prefix}__init__.py": "",
        f"{prefix}a.py": "from tool.sub.z import name",
        f"{prefix}sub/__init__.py": "",
        f"{prefix}sub/z.py": "import os",
    }
    order = understandable_order(texts, package)
    assert order.index(f"{prefix}sub/z.py") < order.index(f"{prefix}a.py")


def test_prose_with_a_line_a_paragraph_is_no_minified_code(tmp_path: Path) -> None:
    write(tmp_path / "repo", {"guide.md": "A sentence of a guide. " * 500, "main.py": "a = 1"})
    assert order_in(read(tmp_path / "repo")[0][0]) == ["guide.md", "main.py"]


def test_a_chain_of_imports_longer_than_the_stack_is_no_trouble() -> None:
    texts = {f"m{n:05}.py": f"import m{n + 1:05}" for n in range(5000)}
    assert understandable_order(texts) == sorted(texts, reverse=True)


LEFT_OUT: dict[str, tuple[str, str | bytes, str]] = {
    "vendored": ("node_modules/x/index.js", "let a", "vendored"),
    "third party": ("a/third_party/x.c", "int a;", "vendored"),
    "ignored": ("secret/notes.py", "a = 1", "ignored by the repository"),
    "lock file": ("poetry.lock", "a", "vendored, built, locked"),
    "minified by name": ("web/app.min.js", "let a", "vendored"),
    "minified by form": ("web/app.js", "var a=1;" * 1000, "minified"),
    "binary": ("tool.py", b"a\x00b", "binary"),
    "Latin-1": ("old.py", b"# caf\xe9", "not UTF-8 text"),
    "generated": ("gen.go", "// Code generated by stringer. DO NOT EDIT.\npackage a", "generated"),
    "marked": ("gen.ts", "/* @generated */\nlet a", "generated"),
    "large": ("big.py", "a = 1\n" * 200_000, "larger than 1.0 MiB"),
    "picture": ("logo.png", b"\x89PNG", "no ending of source code (.png)"),
    "data": ("table.csv", "1,2", "no ending of source code (.csv)"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_nobody_wrote_to_be_read_is_left_out_and_counted(name: str, tmp_path: Path) -> None:
    path, content, reason = LEFT_OUT[name]
    write(tmp_path / "repo", {".gitignore": "secret/\n", "main.py": "kept = 1\n", path: content})
    [text], bad = read(tmp_path / "repo")
    assert order_in(text) == ["main.py"]
    [(said, tally)] = bad.facts()["left_out"].items()
    assert reason in said
    assert tally == {"count": 1, "examples": [str(tmp_path / "repo" / path)]}


def test_hidden_folders_are_not_entered(tmp_path: Path) -> None:
    write(tmp_path / "repo", {"main.py": "kept = 1\n", ".git/config.py": "a = 1", ".venv/lib/x.py": "a = 1"})
    assert order_in(read(tmp_path / "repo")[0][0]) == ["main.py"]


def test_include_takes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "repo", {"a.py": "a = 1", "b.dat": "text", "sub/c.dat": "text"})
    assert order_in(read(tmp_path / "repo", ["*.dat"])[0][0]) == ["b.dat", "sub/c.dat"]
    assert order_in(read(tmp_path / "repo", ["sub/*", "a.py"])[0][0]) == ["a.py", "sub/c.dat"]


def test_links_that_lead_nowhere_or_in_circles_do_not_stop_a_repository(tmp_path: Path) -> None:
    write(tmp_path / "repo", {"main.py": "kept = 1\n"})
    (tmp_path / "repo" / "gone.py").symlink_to("nothing")
    (tmp_path / "repo" / "loop").symlink_to(tmp_path / "repo")
    [text], bad = read(tmp_path / "repo")
    assert order_in(text) == ["main.py"]
    assert sum(tally["count"] for tally in bad.facts()["left_out"].values()) == 2


def test_a_very_large_repository_is_cut_between_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "MAX_DOCUMENT_BYTES", 300)
    write(tmp_path / "repo", {f"f{number}.py": f"number = {number}\n" * 8 for number in range(7)})
    texts, _ = read(tmp_path / "repo")
    assert len(texts) > 1
    assert [name for text in texts for name in order_in(text)] == [f"f{number}.py" for number in range(7)]


def test_a_file_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1")
    with pytest.raises(ArtefactError, match="not a folder; every folder of a code source becomes one document"):
        read(tmp_path / "a.py")


def test_a_folder_without_source_has_no_document(tmp_path: Path) -> None:
    write(tmp_path / "repo", {"logo.png": b"\x89PNG"})
    with pytest.raises(ArtefactError, match="has no usable document: 1 left out: no ending of source code"):
        read(tmp_path / "repo")
