"""The command line: parse, call one function, print.

Only typer, pydantic and yaml are imported here; a command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from typing import NoReturn

# The order is that of the help.
# isort: off
from ftune.cli import recipes, training, studies, runs, talk, about

# isort: on
from ftune.cli.app import app
from ftune.cli.ending import run
from ftune.heap import begin_again, expand_segments
from ftune.run.signals import Interruptible

__all__ = ["about", "app", "main", "recipes", "runs", "studies", "talk", "training"]


def main() -> NoReturn:
    """Run the command line.

    Exits 0, 1 (failed), 2 (the user's mistake), 3 (a plan that does not fit), or 128 + a signal's number (interrupted).
    """
    expand_segments()
    if sys.argv[1:2] == ["train"]:
        begin_again()
    with Interruptible() as signals:
        run(app, signals)
