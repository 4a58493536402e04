"""A recipe in Python: written there, or read from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.api.shown import Shown
from ftune.recipe import load_recipe, require, warnings
from ftune.recipe.load import Loaded
from ftune.recipe.written import options_of, parse_fields, recipe_text

if TYPE_CHECKING:
    from ftune.recipe import schema

__all__ = ["Overrides", "Recipe", "Source", "checked", "load", "recipe_of"]

Overrides = Mapping[str, Any] | Sequence[str]
"""``{"training.max_steps": 20}``, or what ``--set`` takes: ``["training.max_steps=20"]``."""


class Recipe(Shown):
    """A recipe, validated when it is made; it never changes.

    Blocks are mappings, or a string for the main field of one: ``method="lora"`` is ``method={"name": "lora"}``.

    Args:
        model: The base model: a hub id, a directory, a .gguf file, or a block.
        method: A method's name, or a block.
        data: A file, a directory, a hub data set, or a block.
        output_dir: The run's directory, against the current one, as every path is.
        blocks: ``optimizer``, ``schedule``, ``training``, ``checkpoint``, ``evaluation``, ``tracking``.

    Attributes:
        loaded: The recipe with its text and the places of its fields.

    Raises:
        RecipeError: Names every mistake, each by the dotted path of its field.

    Example::

        ftune.Recipe(model="org/model", method={"name": "dora", "rank": 16}, data="train.jsonl", output_dir="runs/x")
    """

    loaded: Loaded
    __slots__ = ("loaded",)

    def __init__(self, **blocks: Any) -> None:
        _keep(self, parse_fields(blocks))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a recipe never changes: ftune.load(recipe, {{'{name}': ...}}) makes another")

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "method", "data", "optimizer", "schedule", "training", "checkpoint", "evaluation"):
            return getattr(self.loaded.recipe, name)
        raise AttributeError(f"a recipe has no {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.loaded.recipe == other.loaded.recipe

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text.rstrip()

    def __reduce__(self) -> tuple[Any, ...]:
        return recipe_of, (self.loaded,)

    @property
    def text(self) -> str:
        """The recipe as YAML, with its overrides."""
        return recipe_text(self.loaded)

    @property
    def values(self) -> schema.Recipe:
        """Every field with its default, as a validated object."""
        return self.loaded.recipe

    @property
    def output_dir(self) -> Path:
        """The run's directory."""
        return Path(self.loaded.recipe.output_dir).expanduser()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What works but is unlikely to be meant."""
        return tuple(warnings(self.loaded))


Source = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""A recipe's file, its fields, or a recipe."""


def load(recipe: Source, overrides: Overrides = (), *, color: bool = False) -> Recipe:
    """Read and validate a recipe, and refuse what cannot run on this machine.

    Args:
        recipe: A YAML file, a mapping of a recipe's fields, or a ``Recipe``.
        overrides: Values in place of the recipe's, by dotted path: ``{"training.max_steps": 20}``.
        color: Whether the message of an error has ANSI colours.

    Raises:
        RecipeError: Names every mistake.
    """
    if isinstance(recipe, Recipe):
        loaded = recipe.loaded
        if options := options_of(overrides):
            loaded = _again(loaded, options, color=color)
    elif isinstance(recipe, Mapping):
        loaded = parse_fields(recipe, overrides)
    else:
        loaded = load_recipe(Path(recipe).expanduser(), options_of(overrides), color=color)
    require(loaded, color=color)
    return recipe_of(loaded)


def checked(recipe: Source, overrides: Overrides = (), *, color: bool = False) -> Recipe:
    """``load``, of which a recipe that was written in Python names the file that its run will keep it in."""
    found = load(recipe, overrides, color=color)
    if found.loaded.positions.source.fields:
        return recipe_of(replace(found.loaded, path=found.output_dir / "recipe.yaml"))
    return found


def _again(loaded: Loaded, options: tuple[str, ...], *, color: bool) -> Loaded:
    from ftune.recipe.load import parse_source

    flag = "" if loaded.positions.source.fields else "--set "
    made = parse_source(loaded.positions.source, (*loaded.overrides, *options), flag=flag, color=color)
    return replace(made, path=loaded.path)


def recipe_of(loaded: Loaded) -> Recipe:
    """A recipe that was read."""
    made = Recipe.__new__(Recipe)
    _keep(made, loaded)
    return made


def _keep(made: Recipe, loaded: Loaded) -> None:
    object.__setattr__(made, "loaded", loaded)
