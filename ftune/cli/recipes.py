"""Commands on a recipe: write one, check it, say what it needs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ftune.cli.app import app
from ftune.cli.options import DOES_NOT_FIT, AsJson, Overrides, RecipePath, home
from ftune.cli.output import color_of, load, method_names, print_json, print_plan
from ftune.errors import FtuneError
from ftune.run.imports import quiet_libraries
from ftune.streams import terminal_width

__all__ = ["init", "plan", "validate"]


SCHEMA_FILE = "recipe.schema.json"
"""Written beside a recipe by `ftune init`, for editors; the recipe's first line points to it."""


@app.command()
def init(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method: see `ftune methods`.")] = "lora",
    model: Annotated[str, typer.Option(help="Hub id, directory, .gguf file or package://NAME/FILE.gguf.")] = (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    data: Annotated[str, typer.Option(help="Training data: a file, a directory or a hub data set.")] = (
        "data/train.jsonl"
    ),
    out: Annotated[
        Path | None, typer.Option(callback=home, help="Where to write; default: METHOD.yaml. `-` prints.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write an annotated recipe for a method.

    Every field stands in it, with its default and what it does; a tenth of the rows is held out.
    """
    from ftune.recipe.template import annotated_recipe, json_schema
    from ftune.run.files import write_text
    from ftune.run.outputs import is_standard_output, is_stream, require_output, write_output

    columns = _columns_for(data)
    text = annotated_recipe(
        method,
        model=model,
        data=data,
        output_dir=f"runs/{method}",
        schema=SCHEMA_FILE,
        eval_fraction=0.1,
        columns=columns,
    )
    if out is not None and is_standard_output(out):
        print(text, end="")
        return
    path = out or Path(f"{method}.yaml")
    if path.is_dir():
        raise FtuneError(f"{path} is a directory", help=f"--out names a file: {path / f'{method}.yaml'}")
    streamed = is_stream(path)
    require_output(path, "--out", [(Path(data), "the training data"), (Path(model), "the model")])
    if path.exists() and not force and not streamed:
        raise FtuneError(f"{path} exists", help="--force replaces it, --out writes elsewhere")
    schema_path = path.parent / SCHEMA_FILE
    try:
        write_output(path, text, "--out")
        if not streamed and not os.path.lexists(schema_path):
            write_text(schema_path, json.dumps(json_schema(), indent=2) + "\n")
    except OSError as error:
        raise FtuneError(
            f"cannot write the recipe: {error}", help="--out names a file in a directory that exists"
        ) from error
    if not streamed:
        if columns:
            said = ", ".join(f"`{name}` is the {field}" for field, name in columns.items())
            print(f"of {data}: {said}; change data.train.columns in the recipe if that is wrong")
        print(f"wrote {path}\nnext: ftune validate {path}, then ftune train {path} or ftune compare {path}")


def _columns_for(data: str) -> dict[str, str]:
    """What a recipe has to say of the columns of a file; nothing where it cannot be read, which `validate` tells."""
    if not Path(data).expanduser().is_file():
        return {}
    from ftune.data.read import columns_for
    from ftune.recipe.schema import DataSource

    with contextlib.suppress(FtuneError):
        return columns_for(DataSource(path=data))
    return {}


@app.command()
def validate(
    recipe: RecipePath,
    data: Annotated[
        bool | None,
        typer.Option("--data/--no-data", help="Show three examples too; or check the recipe alone, without its data."),
    ] = None,
    row: Annotated[
        list[int] | None, typer.Option("--row", metavar="N", min=1, help="Show row N as it is trained. Repeatable.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check a recipe and its data: all mistakes at once, each with its place."""
    if data is False and row:
        raise FtuneError("--row needs the data: leave out --no-data")
    from ftune.recipe import located

    loaded = load(recipe, overrides)
    checked = {"valid": True, "recipe": loaded.recipe.model_dump(mode="json")}
    name = f"{recipe}: valid ({loaded.recipe.method.name} on {loaded.recipe.model.id})"
    if data is not False:
        with quiet_libraries(), located(loaded, color=color_of(sys.stderr)):
            from ftune.artifacts.validation import validated

            said = validated(loaded.recipe, rows=row or (), examples=3 if data else 0, color=color_of(sys.stdout))
        checked |= {"data": said.counts, "shown": list(said.shown)}
        name = "\n".join([*said.shown, name, *said.told])
    print_json(checked) if as_json else print(name)


@app.command()
def plan(
    recipe: RecipePath,
    sizes: Annotated[
        str | None,
        typer.Option(
            "--sizes", help="Plan for another model's sizes: llama-3-8b, mistral-7b, ..., or a config.json's directory."
        ),
    ] = None,
    num_processes: Annotated[int, typer.Option("--num-processes", min=1, help="Processes that share an update.")] = 1,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="How they share what they hold: ddp (the default), fsdp2, fsdp2-offload, deepspeed-zero2 or "
            "deepspeed-zero3.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Plan for this device, h100-80g, or this much memory, 24GiB.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="One line for each of these methods, lora,dora,ia3; or for all.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do and need, without loading weights.

    Exits 3 where it does not fit into the device's memory; of several methods, where none does.
    """
    from ftune.plan.devices import find_device
    from ftune.plan.engine import choose_engine, require_several
    from ftune.plan.sizes import find_sizes

    other = find_sizes(sizes) if sizes is not None else None
    choice = choose_engine(engine, {})
    require_several(choice, num_processes)
    target = find_device(device) if device else None
    if methods is not None and num_processes > 1:
        raise FtuneError("--methods plans one process: leave out --num-processes")
    loaded = load(recipe, overrides)
    if methods is not None:
        with quiet_libraries():
            from dataclasses import asdict

            from ftune.experiments.fits import fits, fits_table

            found = fits(loaded, method_names(methods), sizes=other, target=target)
        print_json([asdict(fit) for fit in found]) if as_json else print(fits_table(found, terminal_width()))
        if not any(fit.verdict in ("fits", "may just fit") for fit in found):
            raise typer.Exit(DOES_NOT_FIT)
        return
    from ftune.api.planning import planned

    summary = planned(
        loaded, sizes=other, num_processes=num_processes, engine=choice, target=target, color=color_of(sys.stderr)
    ).summary
    print_json(summary) if as_json else print_plan(summary)
    if not summary["fits"]:
        raise typer.Exit(DOES_NOT_FIT)
