"""What a recipe asks for by name and this device is much slower in than in the other choice, as measured here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ftune.plan.precision import bf16_speedup

if TYPE_CHECKING:
    import torch

    from ftune.plan.devices import Device
    from ftune.recipe.schema import Recipe

__all__ = ["MUCH", "slower_here"]

MUCH = 2.0
"""How many times slower is worth a warning."""


def slower_here(
    recipe: Recipe, device: torch.device, target: Device | None = None, *, of_run: bool = False
) -> tuple[str, ...]:
    """A warning for every dtype that the recipe names and the device multiplies much slower in than in the other.

    Nothing is measured where the recipe names none. In a group of processes all must call it (``seconds_of``).

    Args:
        recipe: As it was written: what was left to ``auto`` must still say so.
        device: Where the model computes.
        target: The CUDA device to plan for, when it is not the one here: nothing can be measured on it.
        of_run: The recipe is that of a run which has begun: its dtype is settled, and cannot be written otherwise.
    """
    return tuple(_slower(recipe, device, target, of_run))


def _slower(recipe: Recipe, device: torch.device, target: Device | None, of_run: bool) -> Iterator[str]:
    for field, dtype in _named(recipe):
        if target is not None:
            if dtype == "bfloat16" and not target.bfloat16:
                yield f"{target.name} has no instructions for bfloat16; write `{field}: auto`"
            continue
        speedup = bf16_speedup(device)
        other = "bfloat16" if dtype == "float32" else "float32"
        factor = speedup if dtype == "float32" else 1 / speedup if speedup else 0.0
        if factor >= MUCH:
            yield (
                f"{dtype} is {factor:.{0 if factor >= 10 else 1}f} times slower than {other} on this "
                f"{'CPU' if device.type == 'cpu' else 'device'} (measured): "
                + ("the run began in it and keeps it" if of_run else f"write `{field}: auto`")
            )


def _named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Fields of the recipe that name a dtype to compute in, with that dtype."""
    if recipe.model.dtype != "auto":
        yield "model.dtype", recipe.model.dtype
    quantization = recipe.method.base_quantization
    if quantization is not None and quantization.compute_dtype != "auto":
        yield "method.quantization.compute_dtype", quantization.compute_dtype
