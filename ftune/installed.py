"""Which versions of packages are installed."""

from __future__ import annotations

import functools
from importlib import metadata

__all__ = ["version_of"]


@functools.cache
def version_of(package: str) -> str | None:
    """The version of a package; None where it is not installed.

    Looked up once: every look-up searches the directories of ``sys.path``.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
