"""Train a recipe from Python."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftune.api.bounds import at_least
from ftune.api.recipes import Overrides, Recipe, Source, checked
from ftune.api.runs import Run
from ftune.errors import FtuneError, Interrupted, RunFailed
from ftune.heap import expand_segments
from ftune.recipe import warnings
from ftune.run.events import Event, RunStart, Sink
from ftune.run.files import write_text
from ftune.run.imports import import_libraries, quiet_libraries
from ftune.run.launch import as_flags
from ftune.streams import tell as print_line

__all__ = ["train"]


def train(
    recipe: Source,
    overrides: Overrides = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changed_data: bool = False,
    accept_changed_model: bool = False,
    auto_batch: bool = False,
    until: int | None = None,
    num_processes: int | None = None,
    engine: str | None = None,
    num_workers: int | None = None,
    sinks: Sequence[Sink] = (),
    tell: Callable[[str], None] | None = None,
    progress: bool = True,
    show_plan: Callable[[dict[str, Any]], None] | None = None,
    color: bool = False,
) -> Run:
    """Train a recipe into its output_dir, which keeps the recipe in ``recipe.yaml``.

    Args:
        recipe: A file, a mapping of a recipe's fields, or a ``Recipe``.
        overrides: Values in place of the recipe's, by dotted path: ``{"training.max_steps": 20}``.
        resume: Continue from the newest checkpoint; begin where there is none.
        overwrite: Replace the run in output_dir.
        accept_changed_data: With ``resume``: go on although the data changed.
        accept_changed_model: With ``resume``: go on although the base model changed.
        auto_batch: Where memory runs out, halve the micro-batches: the same result.
        until: Pause after this step, evaluated and saved; ``resume`` goes on.
        num_processes: Share every update among so many processes of this machine; each is a new Python.
        engine: How they share the model: ``ddp``, ``fsdp2``, ``fsdp2-offload``, ``deepspeed-zero2``,
            ``deepspeed-zero3``; or ``ray``. Default: as launched, else ``ddp``.
        num_workers: Processes in all, with the engine ``ray``.
        sinks: Receive every event of the run, in this process; what one raises ends the run.
        tell: Takes notes and warnings, a line each. Default: standard error.
        progress: Whether progress may be written to standard error.
        show_plan: Takes the plan as plain data, before any weights are loaded.
        color: Whether reports of the recipe have ANSI colours.

    Raises:
        RecipeError: The recipe or an override is wrong; names every mistake.
        FtuneError: Another mistake of the user's.
        RunFailed: The run began and broke a promise.
        Interrupted: A signal stopped it; the message says what was kept.
    """
    _require_together(resume, overwrite, accept_changed_data, accept_changed_model)
    at_least(1, until=until, num_processes=num_processes, num_workers=num_workers)
    if (engine == "ray") != (num_workers is not None):
        raise FtuneError('engine="ray" and num_workers go together', help='engine="ray", num_workers=2')
    alone = {"accept_changed_data": accept_changed_data, "accept_changed_model": accept_changed_model}
    alone |= {"auto_batch": auto_batch, "until": until is not None}
    here = {"sinks": bool(sinks), "tell": tell is not None, "show_plan": show_plan is not None}
    found = checked(recipe, overrides, color=color)
    for line in warnings(found.loaded, color=color):
        (tell or _print)(line)
    if num_workers is not None:
        _refuse(alone | here | {"num_processes": num_processes is not None}, 'engine="ray"')
        return _on_ray(found, num_workers, resume=resume, overwrite=overwrite)
    if num_processes is not None and num_processes > 1:
        _refuse(here, f"num_processes={num_processes}: it trains in processes of its own")
        options = alone | {"until": until, "resume": resume, "overwrite": overwrite, "engine": engine}
        return _in_processes(found, num_processes, as_flags(options))
    expand_segments()
    with quiet_libraries():
        import_libraries(peft=found.method.saved_as == "peft")
        from ftune.artifacts.training import train as train_recipe

        train_recipe(
            found.loaded,
            resume=resume,
            overwrite=overwrite,
            accept_changed_data=accept_changed_data,
            accept_changed_model=accept_changed_model,
            engine=engine,
            auto_batch=auto_batch,
            until=until,
            sinks=[_Keeper(found), *sinks],
            tell=tell,
            progress=progress,
            show_plan=show_plan or (lambda summary: None),
        )
    return Run(found.output_dir)


class _Keeper:
    """A sink that puts the recipe into the run's directory, once the directory is this run's."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def receive(self, event: Event) -> None:
        if isinstance(event, RunStart):
            write_text(self._recipe.output_dir / "recipe.yaml", self._recipe.text)

    def close(self) -> None:
        pass


def _require_together(resume: bool, overwrite: bool, changed_data: bool, changed_model: bool) -> None:
    if resume and overwrite:
        raise FtuneError("resume and overwrite exclude each other")
    for name, given in (("accept_changed_data", changed_data), ("accept_changed_model", changed_model)):
        if given and not resume:
            raise FtuneError(f"{name} goes with resume: a new run takes what is there as it is")


def _refuse(given: dict[str, bool], beside: str) -> None:
    if wrong := [name for name, on in given.items() if on]:
        raise FtuneError(f"{', '.join(wrong)}: not with {beside}")


def _on_ray(recipe: Recipe, workers: int, *, resume: bool, overwrite: bool) -> Run:
    from ftune.artifacts.ray_engine import require_ray, train_on_ray

    require_ray()
    with quiet_libraries():
        train_on_ray(recipe.loaded, num_workers=workers, resume=resume, overwrite=overwrite)
    return Run(recipe.output_dir)


def _in_processes(recipe: Recipe, processes: int, options: list[str]) -> Run:
    """Train by the command line, in several processes, each of which reads the recipe again."""
    from ftune.run.launch import launch, require_launchable

    require_launchable(processes)
    loaded = recipe.loaded
    with tempfile.TemporaryDirectory(prefix="ftune-recipe-") as scratch:
        path = loaded.path
        if loaded.positions.source.fields:  # there is no file yet
            path = Path(scratch) / "recipe.yaml"
            write_text(path, recipe.text)
        else:
            options = [*options, *(part for option in loaded.overrides for part in ("--set", option))]
        code = launch(processes, ["train", str(path), *options])
    if code > 128:
        raise Interrupted("the run was stopped", signal_number=code - 128, help="resume=True continues it")
    if code:
        raise RunFailed("the run failed in its processes: standard error has the reason")
    write_text(recipe.output_dir / "recipe.yaml", recipe.text)
    return Run(recipe.output_dir)


def _print(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print_line(line)
