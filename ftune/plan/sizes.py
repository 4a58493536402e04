"""The sizes of well-known models, by name: to plan for a model that is not there."""

from __future__ import annotations

from pathlib import Path

from ftune.errors import FtuneError
from ftune.recipe.spelling import closest

__all__ = ["find_sizes", "known_sizes"]

SHIPPED = Path(__file__).parents[1] / "shapes"
"""A directory for each model, with its ``config.json``."""


def known_sizes() -> list[str]:
    """Names of the models whose sizes come with ftune."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def find_sizes(text: str) -> Path:
    """A directory with a ``config.json``: one that is there, or that of a model by name.

    Raises:
        FtuneError: It is neither; names what is known.
    """
    given = Path(text).expanduser()
    if given.name == "config.json" and given.is_file():
        given = given.parent
    if (given / "config.json").is_file():
        return given
    names = known_sizes()
    name = given.name.lower()
    if name in names and given.parent == Path("."):
        return SHIPPED / name
    near = closest(name, names)
    known = f"a directory with a config.json, or one of {', '.join(names)}"
    raise FtuneError(
        f"--sizes {text}: no such model", help=f"did you mean `{near}`? It takes {known}" if near else known
    )
