"""The command that trains."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ftune.cli.app import app
from ftune.cli.options import AsJson, Overrides, RecipePath
from ftune.cli.output import color_of, print_json, print_plan
from ftune.errors import FtuneError
from ftune.streams import outlive_reader

__all__ = ["train"]


@app.command()
def train(
    recipe: RecipePath,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="With --resume: go on although the data changed.")
    ] = False,
    accept_changed_model: Annotated[
        bool, typer.Option("--accept-changed-model", help="With --resume: go on although the base model changed.")
    ] = False,
    auto_batch: Annotated[
        bool, typer.Option("--auto-batch", help="Where memory runs out, halve the micro-batches: the same result.")
    ] = False,
    until: Annotated[
        int | None,
        typer.Option("--until", metavar="N", min=1, help="Pause after step N, evaluated and saved; --resume goes on."),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option("--num-processes", min=1, help="Share every update among N processes, here.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="How several processes share the model: ddp, fsdp2, fsdp2-offload, deepspeed-zero2 or "
            "deepspeed-zero3; or ray: on the workers of a Ray cluster. Default: as launched, else ddp.",
        ),
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option("--num-workers", min=1, help="Processes in all, with --engine ray.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe into its output_dir."""
    from ftune.run.launch import as_flags, follow_launcher, launch, require_launchable

    follow_launcher()
    if resume and overwrite:
        raise FtuneError("--resume and --overwrite exclude each other")
    if accept_changed_data and not resume:
        raise FtuneError("--accept-changed-data goes with --resume: a new run takes the data as it is")
    if accept_changed_model and not resume:
        raise FtuneError("--accept-changed-model goes with --resume: a new run takes the base model as it is")
    if (engine == "ray") != (num_workers is not None):
        raise FtuneError("--engine ray and --num-workers go together", help="--engine ray --num-workers 2")
    if num_workers is not None:
        if num_processes is not None or accept_changed_data or accept_changed_model or auto_batch or until:
            raise FtuneError(
                "--num-processes, --accept-changed-data, --accept-changed-model, --auto-batch and --until do not go "
                "with --engine ray"
            )
        from ftune.artifacts.ray_engine import require_ray

        require_ray()
    if num_processes is not None:
        require_launchable(num_processes)
    if num_processes is not None and num_processes > 1:
        from ftune.plan.engine import engine_for
        from ftune.recipe import load_checked

        # A mistake is told before anything starts; what is only doubtful, by the main process.
        checked = load_checked(recipe, overrides or (), color=color_of(sys.stderr))[0]
        engine_for(checked.recipe, engine, os.environ, auto_batch=auto_batch)
        given = {
            "resume": resume,
            "overwrite": overwrite,
            "accept_changed_data": accept_changed_data,
            "accept_changed_model": accept_changed_model,
            "auto_batch": auto_batch,
            "json": as_json,
            "engine": engine,
            "until": until,
        }
        settings = [part for override in overrides or () for part in ("--set", override)]
        raise typer.Exit(launch(num_processes, ["train", str(recipe), *as_flags(given), *settings]))
    from ftune.api.training import train as run_recipe

    with outlive_reader():
        run = run_recipe(
            recipe,
            overrides or (),
            resume=resume,
            overwrite=overwrite,
            accept_changed_data=accept_changed_data,
            accept_changed_model=accept_changed_model,
            engine=engine,
            num_workers=num_workers,
            auto_batch=auto_batch,
            until=until,
            show_plan=None if num_workers else lambda plan: print_plan(plan, sys.stderr if as_json else sys.stdout),
            color=color_of(sys.stderr),
        )
        if os.environ.get("RANK", "0") != "0":
            return
        if as_json:
            print_json({key: value for key, value in run.record.items() if key != "recipe"})
        else:
            print(run)
