"""What a recipe asks for by name and this device is much slower in than in the other choice, as measured here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftune.plan.machine import Machine
    from ftune.recipe.schema import Recipe

__all__ = ["MUCH", "slower_here"]

MUCH = 2.0
"""How many times slower is worth a warning."""


def slower_here(recipe: Recipe, machine: Machine, *, of_run: bool = False) -> tuple[str, ...]:
    """A warning for every dtype that the recipe names and the machine multiplies much slower in than in the other.

    Args:
        recipe: As it was written: what was left to ``auto`` must still say so.
        machine: Where it runs.
        of_run: The recipe is that of a run which has begun: its dtype is settled, and cannot be written otherwise.
    """
    return tuple(_slower(recipe, machine, of_run))


def _slower(recipe: Recipe, machine: Machine, of_run: bool) -> Iterator[str]:
    for field, dtype in _named(recipe):
        if not machine.measured:
            if dtype == "bfloat16" and not machine.bfloat16:
                yield f"{machine.name} has no instructions for bfloat16; write `{field}: auto`"
            continue
        other = "bfloat16" if dtype == "float32" else "float32"
        factor = machine.flops[other] / machine.flops[dtype] if machine.flops[dtype] else 0.0
        if factor >= MUCH:
            yield (
                f"{dtype} is {factor:.{0 if factor >= 10 else 1}f} times slower than {other} on this "
                f"{'CPU' if machine.device.type == 'cpu' else 'device'} (measured): "
                + ("the run began in it and keeps it" if of_run else f"write `{field}: auto`")
            )


def _named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Fields of the recipe that name a dtype to compute in, with that dtype."""
    if recipe.model.dtype != "auto":
        yield "model.dtype", recipe.model.dtype
    quantization = recipe.method.base_quantization
    if quantization is not None and quantization.compute_dtype != "auto":
        yield "method.quantization.compute_dtype", quantization.compute_dtype
