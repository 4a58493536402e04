"""The import graph: layers import downward only, and nobody but ftune.methods knows a method by name."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ftune
from ftune.methods import METHODS

ROOT = Path(ftune.__file__).parent
LAYERS = [
    "__main__",
    "cli",
    "api",
    "experiments",
    "artifacts",
    "run",
    "plan",
    "memory",
    "data",
    "recipe",
    "methods",
    "models",
    "ops",
    "human",
    "cache",
    "available",
    "installed",
    "version",
    "heap",
    "expressions",
    "streams",
    "regular",
    "errors",
    "scrub",
]
"""From the top down; a module may import from its own layer and from those to the right."""

MODULES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "ftune" and len(parts) > 1 else None


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING"


def imports(node: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, inside functions too, but for type checkers only."""
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*parents, *filter(None, [node.module])])
        # `from ftune import recipe` names a layer in the alias, not in the module.
        yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
    else:
        skipped = node.body if is_type_checking(node) else []  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            if child not in skipped:
                yield from imports(child, package)


def violations(source: str, name: str, is_package: bool = False) -> list[str]:
    package = name if is_package else name.rpartition(".")[0]
    here = layer(name)
    found = []
    for line, imported in imports(ast.parse(source), package):
        there = layer(imported)
        if here in LAYERS and there in LAYERS and LAYERS.index(there) < LAYERS.index(here):
            found.append(f"{name}:{line} imports {imported}")
    return found


def named_methods(source: str, ignored: tuple[str, ...] = ()) -> list[int]:
    """Lines that compare something with a method's name, match it, or make a table of several names."""

    def names(node: ast.AST) -> set[str]:
        elements = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
        return {e.value for e in elements if isinstance(e, ast.Constant) and e.value in METHODS} - set(ignored)

    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            hit = any(names(part) for part in (node.left, *node.comparators))
        elif isinstance(node, ast.MatchValue):
            hit = bool(names(node.value))
        elif isinstance(node, ast.Dict):
            hit = sum(bool(names(key)) for key in node.keys if key is not None) > 1
        else:
            continue
        if hit:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_downward(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), path.name == "__init__.py") == []


def test_every_module_has_a_layer() -> None:
    assert {layer(module_name(path)) for path in MODULES} - {None, *LAYERS} == set()


@pytest.mark.parametrize("path", [path for path in MODULES if layer(module_name(path)) != "methods"], ids=module_name)
def test_no_ladder_over_method_names(path: Path) -> None:
    # In the data layer a prompt is a column of the rows.
    ignored = ("prompt",) if layer(module_name(path)) == "data" else ()
    assert named_methods(path.read_text(), ignored) == []


@pytest.mark.parametrize(
    "source",
    [
        "import ftune.run.loop",
        "from ftune import cli",
        "from ..plan import resolve",
        "def late():\n    from ftune.data import sources",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import ftune.cli",
    ],
)
def test_the_graph_test_sees_an_upward_import(source: str) -> None:
    assert len(violations(source, "ftune.recipe.load")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from ftune.methods import base",
        "if TYPE_CHECKING:\n    import ftune.cli",
        "from . import x",
    ],
)
def test_the_graph_test_lets_other_imports_pass(source: str) -> None:
    assert violations(source, "ftune.recipe.load") == []


@pytest.mark.parametrize(
    "source",
    [
        "if name == 'lora': pass",
        "x = 'qlora' != name",
        "x = name in ('full', 'other')",
        "match name:\n    case 'dora': pass",
        "table = {'lora': 1, 'full': 2}",
    ],
)
def test_the_ladder_test_sees_a_ladder(source: str) -> None:
    assert named_methods(source) == [1 if "match" not in source else 2]


@pytest.fixture(scope="module")
def structure() -> Any:
    """The figures that scripts/structure.py prints."""
    return SimpleNamespace(**runpy.run_path(str(ROOT.parent / "scripts/structure.py")))


def test_no_circle_of_imports_and_no_private_module_of_another_package(structure: Any) -> None:
    found = structure.look()
    assert found.circles == []
    assert found.private == []


def test_what_is_too_long_or_too_wide_becomes_fewer(structure: Any) -> None:
    found = structure.look()
    # Lower these with the code; a new one has its reason beside it, or is made smaller.
    assert len(found.files) <= 6, found.files
    assert len(found.long) <= 11, found.long
    assert len(found.wide) <= 18, found.wide


def test_the_figures_see_a_circle_a_long_function_and_a_wide_one(structure: Any, tmp_path: Path) -> None:
    package = tmp_path / "ftune"
    package.mkdir()
    wide = "def wide(a, b, c, d, e, f, g):\n    return a\n"
    (package / "one.py").write_text("import ftune.two\n" + wide)
    (package / "two.py").write_text("def late():\n    import ftune.one\n" + "    x = 1\n" * 70)
    found = structure.look(package)
    assert (len(found.circles), len(found.wide), len(found.long)) == (1, 1, 1)
