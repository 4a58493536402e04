"""What a run would do and need."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.api.bounds import at_least
from ftune.api.recipes import Overrides, Recipe, Source, load, recipe_of
from ftune.api.shown import Shown
from ftune.recipe import located
from ftune.run.imports import quiet_libraries
from ftune.streams import terminal_width

if TYPE_CHECKING:
    from ftune.memory.estimate import MemoryEstimate
    from ftune.plan.devices import Device
    from ftune.plan.engine import EngineChoice
    from ftune.recipe.load import Loaded

__all__ = ["Planned", "plan", "planned"]


@dataclass(frozen=True, repr=False)
class Planned(Shown):
    """What a run would do and need; its ``repr`` is the table of ``ftune plan``.

    Attributes:
        recipe: What was planned.
        memory: Predicted bytes at the peak, by what takes them; ``total`` is their sum.
        budget: Bytes that the run may take.
        fits: Whether it does.
        steps: Optimizer updates in all.
        warnings: What works, but perhaps not as meant.
        summary: All of it as plain data, as ``ftune plan --json`` prints it.
    """

    recipe: Recipe
    memory: MemoryEstimate
    budget: int
    fits: bool
    steps: int
    warnings: tuple[str, ...]
    summary: dict[str, Any] = field(compare=False)

    def __str__(self) -> str:
        from ftune.plan.table import render_plan

        return render_plan(self.summary, terminal_width())


def plan(
    recipe: Source,
    overrides: Overrides = (),
    *,
    sizes: str | os.PathLike[str] | None = None,
    num_processes: int = 1,
    engine: str | None = None,
    device: str | None = None,
) -> Planned:
    """Say what a run would do and need, without loading weights.

    Args:
        recipe: A file, a mapping or a ``Recipe``.
        overrides: As ``load`` takes them.
        sizes: Plan for another model's sizes: ``llama-3-8b``, or a directory with a config.json.
        num_processes: Processes that share an update.
        engine: How they do: ``ddp`` (the default), ``fsdp2``, ``fsdp2-offload``, ``deepspeed-zero2``,
            ``deepspeed-zero3``.
        device: Plan for this device, ``h100-80g``, or this much memory, ``24GiB``.

    Raises:
        FtuneError: The user's mistake, in the recipe, its data or an argument.
    """
    from ftune.plan.devices import find_device
    from ftune.plan.engine import choose_engine, require_several
    from ftune.plan.sizes import find_sizes

    at_least(1, num_processes=num_processes)
    other = find_sizes(os.fspath(sizes)) if sizes is not None else None
    choice = choose_engine(engine, {})
    require_several(choice, num_processes)
    known = find_device(device) if device else None
    loaded = load(recipe, overrides).loaded
    return planned(loaded, sizes=other, num_processes=num_processes, engine=choice, target=known)


def planned(
    loaded: Loaded,
    *,
    sizes: Path | None,
    num_processes: int,
    engine: EngineChoice,
    target: Device | None,
    color: bool = False,
) -> Planned:
    """Plan a checked recipe.

    Args:
        loaded: The recipe.
        sizes: A directory with the config.json of a model to plan for.
        num_processes: Processes that share an update.
        engine: How they do.
        target: Plan for this device.
        color: Whether the message of an error has ANSI colours.
    """
    with quiet_libraries(), located(loaded, color=color):
        from ftune.plan.machine import Machine
        from ftune.plan.resolve import resolve
        from ftune.plan.summary import summary_of

        machine = Machine.of(target) if target else None
        made = resolve(loaded.recipe, sizes=sizes, world_size=num_processes, engine=engine, machine=machine)
        summary = summary_of(made)
    return Planned(
        recipe_of(loaded),
        made.memory,
        summary["budget"],
        summary["fits"],
        summary["training"]["steps"],
        tuple(summary["warnings"]),
        summary,
    )
