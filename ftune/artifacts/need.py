"""Packages that only comparisons need."""

from __future__ import annotations

import importlib
from types import ModuleType

from ftune.errors import FtuneError

__all__ = ["need"]


def need(name: str) -> ModuleType:
    """A module of the extra ``compare``.

    Raises:
        FtuneError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise FtuneError(f"a comparison needs {package}", help="pip install 'ftune[compare]'") from error
