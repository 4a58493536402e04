"""The recipe layer: text to a checked ``Recipe``, without torch.

``load_checked`` is the way in for commands; ``load_recipe`` parses only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftune.errors import LocatedDataError, RecipeError
from ftune.methods import Problem
from ftune.recipe.checks import advise, check
from ftune.recipe.data_files import LocatedData, locate_data
from ftune.recipe.diagnose import from_problems
from ftune.recipe.load import Loaded, load_recipe, parse_recipe
from ftune.recipe.locate import Located, locate_model
from ftune.recipe.rendering import fail, render
from ftune.recipe.schema import Recipe
from ftune.recipe.template import annotated_recipe, json_schema

__all__ = [
    "Loaded",
    "Located",
    "LocatedData",
    "Recipe",
    "annotated_recipe",
    "at_fields",
    "check",
    "json_schema",
    "load_checked",
    "load_recipe",
    "locate_data",
    "locate_model",
    "located",
    "parse_recipe",
    "require",
    "warnings",
]


def require(loaded: Loaded, *, color: bool = False) -> None:
    """Refuse a recipe that parses but cannot run here.

    Raises:
        RecipeError: Names every problem, at the line that causes it.
    """
    if problems := check(loaded.recipe):
        raise fail(from_problems(problems, loaded.positions), loaded.positions.source, color=color)


def at_fields(error: LocatedDataError, loaded: Loaded, *, color: bool = False) -> RecipeError:
    """What the data says of fields of the recipe, at the lines where they are written."""
    problems = [Problem(path, message, help) for path, message, help in error.places]
    return fail(from_problems(problems, loaded.positions), loaded.positions.source, color=color)


@contextlib.contextmanager
def located(loaded: Loaded, *, color: bool = False) -> Iterator[None]:
    """Show what the data says of fields of the recipe at the fields."""
    try:
        yield
    except LocatedDataError as error:
        raise at_fields(error, loaded, color=color) from error


def warnings(loaded: Loaded, *, color: bool = False) -> list[str]:
    """One report for each thing that works but is unlikely to be meant, and the notes on overrides."""
    source = loaded.positions.source
    mistakes = from_problems(advise(loaded.recipe), loaded.positions)
    return [*loaded.notes, *(render(mistake, source, level="warning", color=color) for mistake in mistakes)]


def load_checked(path: Path, overrides: Sequence[str] = (), *, color: bool = False) -> tuple[Loaded, list[str]]:
    """Load a recipe, refuse what cannot run here, and return it with its warnings.

    Raises:
        RecipeError: The recipe or an override is wrong, or cannot work on this machine; names every mistake.
    """
    loaded = load_recipe(path, overrides, color=color)
    require(loaded, color=color)
    return loaded, warnings(loaded, color=color)
