"""Declarative fine-tuning: a recipe in, a proven adapter out.

From Python::

    import ftune

    run = ftune.train("recipe.yaml", overrides={"training.max_steps": 20})
    run.evaluate(base=True)
    run.merge()

Nothing is imported before it is asked for: ``import ftune`` costs no torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ftune.version import __version__ as __version__

if TYPE_CHECKING:
    from ftune.api import (
        Conversion,
        Evaluation,
        Generation,
        Merge,
        Planned,
        Recipe,
        Run,
        convert,
        evaluate,
        generate,
        load,
        merge,
        plan,
        train,
    )
    from ftune.errors import (
        DataError,
        FtuneError,
        Interrupted,
        LocatedDataError,
        ModelError,
        RecipeError,
        RunDirError,
        RunFailed,
        RunInUse,
    )
    from ftune.run.events import Event, Sink

__all__ = [
    "Conversion",
    "DataError",
    "Evaluation",
    "Event",
    "FtuneError",
    "Generation",
    "Interrupted",
    "LocatedDataError",
    "Merge",
    "ModelError",
    "Planned",
    "Recipe",
    "RecipeError",
    "Run",
    "RunDirError",
    "RunFailed",
    "RunInUse",
    "Sink",
    "convert",
    "evaluate",
    "generate",
    "load",
    "merge",
    "plan",
    "train",
]

_ELSEWHERE = {"Event": "ftune.run.events", "Sink": "ftune.run.events"}
_PACKAGES = ("plan",)
"""Functions that have the name of a package: the package is called in their place."""


class _Package(ModuleType):
    """A package that is also the function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function of ``ftune.api``."""
        return getattr(importlib.import_module("ftune.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Ftune(ModuleType):
    """This package. Python sets each package below it as an attribute, once it was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PACKAGES and type(value) is ModuleType:
            value.__class__ = _Package
        super().__setattr__(name, value)


importlib.import_module(__name__).__class__ = _Ftune


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"ftune.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'ftune' has no attribute {name!r}")
    where = "ftune.errors" if name.endswith("Error") or name in ("Interrupted", "RunFailed", "RunInUse") else None
    return getattr(importlib.import_module(where or _ELSEWHERE.get(name, "ftune.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
