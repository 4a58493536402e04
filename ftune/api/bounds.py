"""Numbers that a function refuses, as the command line does."""

from __future__ import annotations

from ftune.errors import FtuneError

__all__ = ["at_least"]


def at_least(least: int, **given: int | None) -> None:
    """Refuse numbers below the least that makes sense, by the name of their parameter; None is no number.

    Raises:
        FtuneError: Names the parameter, its value and the least.
    """
    for name, value in given.items():
        if value is not None and value < least:
            raise FtuneError(f"{name}={value}: at least {least}")
