"""The application, to which every module of this package adds its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from ftune.version import __version__

__all__ = ["app"]

app = typer.Typer(
    name="ftune",
    help="Fine-tune a language model from a recipe; evaluate, merge and talk to what comes out.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"ftune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
