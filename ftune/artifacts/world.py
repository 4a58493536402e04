"""A run that goes on in another number of processes keeps its global batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftune.errors import RunDirError
from ftune.plan.recompute import is_random
from ftune.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import nn

__all__ = ["in_world", "note_of", "with_accumulation"]


def with_accumulation(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of micro-batches in an update."""
    training = recipe.training.model_copy(update={"gradient_accumulation_steps": steps})
    return recipe.model_copy(update={"training": training})


def in_world(recipe: Recipe, began: Recipe, before: dict[str, Any], world: int) -> Recipe:
    """A recipe for resuming with as many micro-batches as make the run's global batch on ``world`` processes.

    Every update then sees the rows it would have seen. A recipe whose accumulation was changed is left as it is
    where that changes the batch, so that the comparison with the run finds it.

    Args:
        recipe: As the user gives it now, with what it leaves out as the run began (``RunDir.as_begun``).
        began: As the run began.
        before: The run's ``run.json``.
        world: Processes now.

    Raises:
        RunDirError: The global batch cannot be shared by so many processes.
    """
    batch = int(before["plan"]["training"]["global_batch"])
    micro, now = recipe.training.micro_batch_size, recipe.training.accumulation
    if micro != began.training.micro_batch_size:
        return recipe
    if micro * now * world != batch and now != began.training.gradient_accumulation_steps:
        return recipe
    steps, left = divmod(batch, micro * world)
    if left:
        counts = [str(count) for count in range(1, batch // micro + 1) if batch % (micro * count) == 0]
        raise RunDirError(
            f"this run's global batch is {batch} rows in micro-batches of {micro}: {world} processes cannot share it "
            "evenly",
            help=f"resume on {' or '.join((', '.join(counts[:-1]), counts[-1]) if counts[1:] else counts)} "
            f"process{'es' * (counts != ['1'])}",
        )
    return with_accumulation(recipe, steps)


def note_of(before: dict[str, Any], now: dict[str, Any], model: nn.Module) -> list[str]:
    """What a change of the number of processes does: a line, or none where it did not change.

    Args:
        before: ``plan.training`` in the run's ``run.json``.
        now: The same of this part of the run.
        model: Tells whether anything is dropped at random.
    """
    if before.get("world_size") == now["world_size"]:
        return []
    accumulation = "gradient_accumulation_steps"
    line = (
        f"note: {_processes(now['world_size'])} now, {before['world_size']} before: {accumulation} {now[accumulation]} "
        f"instead of {before[accumulation]} keeps the global batch of {now['global_batch']} rows"
    )
    if is_random(model):
        line += "; dropout differs from what it would have been, for each process draws its own"
    return [line]


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
