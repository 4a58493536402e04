"""Regular expressions of a recipe, which may come from a stranger: compiled and matched in bounded time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex

__all__ = ["compiled", "matching"]

MAX_CHARACTERS = 10_000
SECONDS = 2.0
"""For all names of a model together; an ordinary expression needs a thousandth of it."""


def compiled(expression: str) -> regex.Pattern[str]:
    """A regular expression that can be matched with a time limit.

    Raises:
        ValueError: It is none, or is too long to be meant.
    """
    # Not Python's own: that cannot be stopped.
    import regex

    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_CHARACTERS:,} characters")
    try:
        return regex.compile(expression)
    except (regex.error, OverflowError) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def matching(expression: str, names: Iterable[str]) -> list[str]:
    """The names that an expression matches as a whole.

    Raises:
        ValueError: It is no regular expression, or takes longer than ``SECONDS``.
    """
    pattern, end = compiled(expression), time.monotonic() + SECONDS
    found = []
    for name in names:
        try:
            if pattern.fullmatch(name, timeout=max(end - time.monotonic(), 0.001)):
                found.append(name)
        except TimeoutError:
            raise ValueError(
                f"it took longer than {SECONDS:g} seconds; repetitions inside of repetitions, as in (a+)+, do"
            ) from None
    return found
