"""Commands on what ftune knows: methods, and the schema of recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from ftune.cli.app import app
from ftune.cli.options import AsJson
from ftune.cli.output import print_json
from ftune.streams import terminal_width

__all__ = ["methods", "schema"]


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="One method in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """List every method; of one: when to choose it, what it costs, what it composes with."""
    from ftune.artifacts.method_table import method_card, method_row, method_rows, method_table

    if as_json:
        print_json(method_rows() if name is None else method_row(name))
    else:
        print(method_table(terminal_width()) if name is None else method_card(name, terminal_width()))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors and other tools."""
    from ftune.recipe.template import json_schema

    print_json(json_schema())
