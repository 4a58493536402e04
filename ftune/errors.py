"""The exceptions that ftune raises on purpose, and the exit code of each.

::

    FtuneError                 2   the user's mistake: a message, no traceback
    ├── RecipeError            2   one or more located mistakes in a recipe or in an option
    ├── DataError              2   a file or a row that cannot be trained on
    │   └── LocatedDataError   2   fields of the recipe that the data does not bear out
    ├── ModelError             2   a base model that cannot be found or cannot do what was asked
    ├── RunDirError            2   a run directory that is missing, unfinished or already taken
    │   └── RunInUse           2   another process holds the run: a later try may have it
    ├── RunFailed              1   the run started and did not do what it promised
    └── Interrupted      130/143   SIGINT or SIGTERM (129: SIGHUP); the message says what was kept

A broken invariant of ftune's own is an ``AssertionError`` and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

from ftune.scrub import harmless, scrub

__all__ = [
    "DataError",
    "FtuneError",
    "Interrupted",
    "LocatedDataError",
    "ModelError",
    "RecipeError",
    "RunDirError",
    "RunFailed",
    "RunInUse",
]


class FtuneError(Exception):
    """A failure that the user can act on: printed as a message, without a traceback.

    Args:
        message: What is wrong, in one sentence or several lines.
        help: How to mend it, printed behind ``help:``.
    """

    exit_code: int = 2

    def __init__(self, message: str, *, help: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.help = help

    def render(self) -> str:
        """The text shown to the user, without colour, without secrets, and without what a terminal obeys."""
        text = f"error: {self.message}"
        return harmless(scrub(f"{text}\n  help: {self.help}" if self.help else text))


class RecipeError(FtuneError):
    """Mistakes in a recipe, all of them; ``render`` gives each with its position.

    Args:
        reports: One rendered report for each mistake (see ``ftune.recipe.diagnose``).
    """

    def __init__(self, reports: list[str]) -> None:
        super().__init__("\n\n".join(reports))
        self.reports = reports

    def render(self) -> str:
        """Every report, and their count when there are several."""
        count = len(self.reports)
        tail = f"\n\n{count} errors" if count > 1 else ""
        return scrub("\n\n".join(self.reports) + tail)


class DataError(FtuneError):
    """Data that cannot be read, or a row that does not fit its format."""


class LocatedDataError(DataError):
    """Data that is not what fields of the recipe say of it.

    Args:
        places: Of each mistake the field's path, what is wrong, and how to mend it.
    """

    def __init__(self, places: Sequence[tuple[tuple[str | int, ...], str, str | None]]) -> None:
        self.places = tuple(places)
        (path, message, help), *others = places
        lines = [f"`{'.'.join(map(str, other))}`: {text}" for other, text, _ in others]
        super().__init__("\n  ".join([f"`{'.'.join(map(str, path))}`: {message}", *lines]), help=help)


class ModelError(FtuneError):
    """A base model that cannot be found, or that cannot do what the recipe asks."""


class RunDirError(FtuneError):
    """A run directory that is missing, unfinished, or belongs to another run."""


class RunInUse(RunDirError):
    """A run directory that another process holds now."""


class RunFailed(FtuneError):
    """The run began and then broke a promise: a loss that is not finite, a parameter that never moved."""

    exit_code = 1


class Interrupted(FtuneError):
    """A signal stopped the run: after a checkpoint was saved, or at once.

    Args:
        message: What happened.
        signal_number: 1 for SIGHUP, 2 for SIGINT, 15 for SIGTERM; the exit code is 128 more.
        help: How to go on.
        together: Whether all processes of a run agreed to stop here, so that they can take leave of each other.
    """

    def __init__(self, message: str, *, signal_number: int, help: str | None = None, together: bool = True) -> None:
        super().__init__(message, help=help)
        self.together = together
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
