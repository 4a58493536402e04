"""What several commands do: load a recipe, print JSON, a plan, a width of lines."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.errors import FtuneError
from ftune.streams import terminal_width

if TYPE_CHECKING:
    from ftune.recipe import Loaded

__all__ = [
    "color_of",
    "command_line",
    "load",
    "method_names",
    "paint",
    "print_json",
    "print_plan",
]


def paint(text: str) -> str:
    """Colour ``error:`` and ``help:`` for a terminal."""
    if not color_of(sys.stderr):
        return text
    return text.replace("error:", "\x1b[1;31merror:\x1b[0m").replace("help:", "\x1b[1;36mhelp:\x1b[0m")


def color_of(stream: Any) -> bool:
    """Whether what is written there may have colours."""
    return bool(stream.isatty()) and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def print_json(data: Any) -> None:
    """Print one object to standard output."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def load(path: Path, overrides: list[str] | None) -> Loaded:
    """Load and check a recipe; what is only doubtful is printed to standard error."""
    from ftune.recipe import load_checked

    loaded, warnings = load_checked(path, overrides or (), color=color_of(sys.stderr))
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings:
            print(warning, file=sys.stderr)
    return loaded


def method_names(text: str) -> list[str]:
    """Methods that an option names.

    Raises:
        FtuneError: There is no such method.
    """
    from ftune.methods import METHODS
    from ftune.recipe.spelling import closest

    names = list(METHODS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            near = closest(name, METHODS)
            help = f"did you mean `{near}`?" if near else f"methods: {', '.join(METHODS)}, or all"
            raise FtuneError(f"--methods: unknown method `{name}`", help=help)
    return names


def print_plan(summary: dict[str, Any], stream: Any = None) -> None:
    """Print the table of a plan."""
    from ftune.plan.table import render_plan

    print(render_plan(summary, terminal_width()), file=stream or sys.stdout, flush=True)


def command_line() -> str:
    """The command as it was given."""
    return " ".join(["ftune", *map(shlex.quote, sys.argv[1:])])
