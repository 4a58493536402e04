"""What a recipe asks for by name and this device is much slower in than in the other choice, as measured here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ftune.plan import precision

if TYPE_CHECKING:
    import torch

    from ftune.plan.machine import Machine
    from ftune.recipe.schema import Recipe

__all__ = ["MUCH", "slower_here", "slower_on"]

MUCH = 2.0
"""How many times slower is worth a warning."""


def slower_on(machine: Machine, recipe: Recipe, *, of_run: bool = False) -> tuple[str, ...]:
    """A warning for every dtype that the recipe names and a machine multiplies much slower in than in the other.

    Args:
        machine: Where it runs.
        recipe: As it was written: what was left to ``auto`` must still say so.
        of_run: The recipe is that of a run which has begun: its dtype is settled, and cannot be written otherwise.
    """
    if machine.measured:
        return tuple(_slower(recipe, machine.device.type, machine.flops, of_run))
    return tuple(
        f"{machine.name} has no instructions for bfloat16; write `{field}: auto`"
        for field, dtype in _named(recipe)
        if dtype == "bfloat16" and not machine.bfloat16
    )


def slower_here(recipe: Recipe, device: torch.device, *, of_run: bool = False) -> tuple[str, ...]:
    """``slower_on`` of this machine, of which nothing but matmuls is measured, and not those where none is named.

    In a group of processes all must call it (``seconds_of``).
    """
    if not any(_named(recipe)):
        return ()
    return tuple(_slower(recipe, device.type, precision.matmul_speeds(device), of_run))


def _slower(recipe: Recipe, kind: str, flops: Mapping[str, float], of_run: bool) -> Iterator[str]:
    for field, dtype in _named(recipe):
        other = "bfloat16" if dtype == "float32" else "float32"
        factor = flops[other] / flops[dtype] if flops[dtype] else 0.0
        if factor >= MUCH:
            yield (
                f"{dtype} is {factor:.{0 if factor >= 10 else 1}f} times slower than {other} on this "
                f"{'CPU' if kind == 'cpu' else 'device'} (measured): "
                + ("the run began in it and keeps it" if of_run else f"write `{field}: auto`")
            )


def _named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Fields of the recipe that name a dtype to compute in, with that dtype."""
    if recipe.model.dtype != "auto":
        yield "model.dtype", recipe.model.dtype
    quantization = recipe.method.base_quantization
    if quantization is not None and quantization.compute_dtype != "auto":
        yield "method.quantization.compute_dtype", quantization.compute_dtype
