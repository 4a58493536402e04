"""Print the structure's figures: long files, long or wide functions, circles of imports, doors that are passed by.

Usage::

    python scripts/structure.py [--all]

A function may be longer or wider than the limits where the reason stands beside it: ``# long: ...``, ``# wide: ...`` on
the line of its ``def``. Keyword-only parameters with a default are options, and are not counted.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1] / "ftune"
MOST_LINES = 400
"""Of a file."""
LONGEST, WIDEST = 60, 6
"""Lines and parameters of a function."""


@dataclass
class Structure:
    """What was found, each as text to print.

    Attributes:
        files: Files with more lines than a reading takes.
        long: Functions with too many lines.
        wide: Functions with too many parameters.
        circles: Modules that import each other in turns, when they are loaded, in a function, or for types alone.
        private: Imports of another package's module whose name begins with an underscore.
        lines: Of all source.
        modules: Their number.
    """

    files: list[str] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    wide: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)
    private: list[str] = field(default_factory=list)
    lines: int = 0
    modules: int = 0


def look(root: Path = ROOT) -> Structure:
    """Read every module below a package's directory."""
    found, imports = Structure(), dict[str, set[str]]()
    paths = {_name(path, root): path for path in sorted(root.rglob("*.py"))}
    for name, path in paths.items():
        text = path.read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text)
        found.lines += len(lines)
        found.modules += 1
        if len(lines) > MOST_LINES:
            found.files.append(f"{name}: {len(lines)} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                _measure(node, name, lines, found)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        imports[name] = set()
        for imported in _imported(tree, package):
            target = next((t for t in (imported, imported.rpartition(".")[0]) if t in paths), None)
            if target is None or target == name:
                continue
            imports[name].add(target)
            where, _, last = target.rpartition(".")
            if last.startswith("_") and not last.startswith("__") and not f"{package}.".startswith(f"{where}."):
                private = f"{name} imports {target}"
                found.private += [private] if private not in found.private else []
    found.circles = [" <-> ".join(circle) for circle in circles(imports)]
    return found


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules of which each reaches all others by imports (Tarjan, SIAM J. Comput. 1(2), 1972).

    Args:
        imports: Of each module the modules it imports.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(imports.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(group := stack[at:]) > 1:
                found.append(sorted(group))
            del stack[at:]

    for node in sorted(imports):
        if node not in index:
            visit(node)
    return sorted(found)


def _measure(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, lines: list[str], found: Structure) -> None:
    """Keep a function that is too long or has too many parameters, without a reason beside it."""
    head = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
    body = node.body[1:] if ast.get_docstring(node) else node.body
    length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
    if length > LONGEST and "# long: " not in head:
        found.long.append(f"{name}:{node.lineno} {node.name}: {length} lines")
    given = [*node.args.posonlyargs, *node.args.args]
    must = [arg for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if default is None]
    count = len(given) + len(must) - bool(given and given[0].arg in ("self", "cls"))
    command = any("command(" in ast.unparse(one) for one in node.decorator_list)  # of which typer makes options
    if count > WIDEST and not command and "# wide: " not in head:
        found.wide.append(f"{name}:{node.lineno} {node.name}: {count} parameters")


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Everything that a module imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main() -> None:
    """Print the figures, and with --all what they count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="name every place")
    show, found = parser.parse_args().all, look()
    print(f"{found.modules} modules, {found.lines:,} lines")
    for what, places in (
        (f"files over {MOST_LINES} lines", found.files),
        (f"functions over {LONGEST} lines", found.long),
        (f"functions over {WIDEST} parameters", found.wide),
        ("circles of imports", found.circles),
        ("imports of another package's private module", found.private),
    ):
        print(f"{len(places):4} {what}")
        for place in places if show else ():
            print(f"       {place}")


if __name__ == "__main__":
    main()
