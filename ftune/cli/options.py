"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftune.errors import FtuneError

__all__ = [
    "DOES_NOT_FIT",
    "AsJson",
    "Checkpoint",
    "Overrides",
    "RecipePath",
    "RunOrRecipe",
    "RunPath",
    "Scale",
    "home",
    "homes",
]

DOES_NOT_FIT = 3
"""Exit code of `ftune plan` where the run needs more memory than there is."""


def home(path: Path | None) -> Path | None:
    """A path whose ``~`` the shell left as it was (``--out=~/x``)."""
    try:
        return None if path is None else path.expanduser()
    except RuntimeError as error:
        raise FtuneError(f"`{path}`: {error}", help="write the path out") from error


def homes(paths: list[Path]) -> list[Path]:
    """Paths as ``home`` gives them."""
    return [path for path in map(home, paths) if path is not None]


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", callback=home, help="A recipe (YAML).")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", callback=home, help="A run directory (a recipe's output_dir).")]
RunOrRecipe = Annotated[
    Path, typer.Argument(metavar="RUN_OR_RECIPE", callback=home, help="A run directory, or a recipe.")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", "--step", metavar="N", help="Take the checkpoint of this step, also while the run goes on."
    ),
]
Scale = Annotated[
    float, typer.Option("--scale", metavar="S", help="Take this share of what training changed: W0 + S (W - W0).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value: training.max_steps=20. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
