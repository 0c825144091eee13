"""Imports go one way, and what starts in a moment stays quick: no torch before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ctxext

PACKAGE = Path(ctxext.__file__).parent
# Left never imports right; what stands together may import each other.
LAYERS = [
    ["errors"],
    ["files"],
    ["rope"],
    ["recipe"],
    ["model"],
    ["data"],
    ["evaluation"],
    ["planning"],
    ["train"],
    ["export"],
    ["search", "pipeline"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "matplotlib", "scipy"}


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layer(module: str) -> str | None:
    """The layer of a dotted name below ctxext; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


MODULES = modules()


def test_every_module_belongs_to_a_layer() -> None:
    assert len(MODULES) >= 50
    assert {layer(name) for name in MODULES} - {None} <= set(RANK)


def test_imports_go_from_right_to_left() -> None:
    num_imports = 0
    wrong = []
    for module, path in MODULES.items():
        importer = layer(module)
        if importer is None:
            continue  # the public API names everything, lazily
        for line, target in imports(path):
            if not target.startswith("ctxext."):
                continue
            imported = layer(target)
            if imported in RANK:
                num_imports += 1
                if RANK[imported] > RANK[importer]:
                    wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {importer} imports {target}")
            else:
                assert imported == "__version__", f"{path}:{line}: {target}"
    assert num_imports > 100
    assert not wrong


def test_the_public_names_exist_where_the_package_looks_for_them() -> None:
    for name in ctxext.__all__:
        assert getattr(ctxext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ctxext.nothing  # noqa: B018


def test_rope_methods_and_recipes_need_no_torch() -> None:
    for module in ("errors", "files", "rope.methods", "rope.families", "rope.patchers", "recipe.schema", "recipe.load"):
        path = MODULES[f"ctxext.{module}"]
        assert not {target.split(".")[0] for _, target in imports(path)} & HEAVY


@pytest.mark.parametrize(
    "code",
    [
        "import ctxext",
        "import ctxext; ctxext.Recipe, ctxext.load_recipe, ctxext.extend_config, ctxext.CtxextError",
        "import ctxext.cli",
        "import sys; sys.argv = ['ctxext', '--help']; from ctxext.cli import main; main()",
        "import sys; sys.argv = ['ctxext', 'extend', '--help']; from ctxext.cli import main; main()",
    ],
    ids=["package", "public names", "cli", "--help", "extend --help"],
)
def test_torch_is_not_loaded_before_it_is_needed(code: str) -> None:
    check = (
        f"import atexit, sys; atexit.register(lambda: print('LOADED', *sorted({HEAVY!r} & set(sys.modules))))\n{code}"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1].split() == ["LOADED"]
