"""What a run would do and need."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ftune.api.bounds import at_least
from ftune.api.recipes import Overrides, Recipe, Source, load
from ftune.api.shown import Shown, width

__all__ = ["Memory", "Planned", "plan"]


@dataclass(frozen=True)
class Memory:
    """Predicted bytes at the peak, by what takes them; ``total`` is their sum."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    runtime: int
    total: int


@dataclass(frozen=True, repr=False)
class Planned(Shown):
    """What a run would do and need; its ``repr`` is the table of ``ftune plan``.

    Attributes:
        recipe: What was planned.
        memory: Predicted bytes at the peak.
        budget: Bytes that the run may take.
        fits: Whether it does.
        steps: Optimizer updates in all.
        warnings: What works, but perhaps not as meant.
        summary: All of it as plain data, as ``ftune plan --json`` prints it.
    """

    recipe: Recipe
    memory: Memory
    budget: int
    fits: bool
    steps: int
    warnings: tuple[str, ...]
    summary: dict[str, Any] = field(compare=False)

    def __str__(self) -> str:
        from ftune.plan.table import render_plan

        return render_plan(self.summary, width())


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
    from ftune.recipe import at_fields
    from ftune.run.imports import quiet_libraries

    at_least(1, num_processes=num_processes)
    other = find_sizes(os.fspath(sizes)) if sizes is not None else None
    choice = choose_engine(engine, {})
    require_several(choice, num_processes)
    known = find_device(device) if device else None
    found = load(recipe, overrides)
    with quiet_libraries():
        from ftune.errors import LocatedDataError
        from ftune.plan.machine import Machine
        from ftune.plan.resolve import resolve
        from ftune.plan.summary import summary_of

        machine = Machine.of(known) if known else None

        try:
            made = resolve(found.values, sizes=other, world_size=num_processes, engine=choice, machine=machine)
            summary = summary_of(made)
        except LocatedDataError as error:
            raise at_fields(error, found.loaded) from error
    return Planned(
        found,
        Memory(**summary["memory"]),
        summary["budget"],
        summary["fits"],
        summary["training"]["steps"],
        tuple(summary["warnings"]),
        summary,
    )
