"""Made-up studies, whose truth is known: scores of methods with as much noise of seeds and items as is asked for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special

ITEM, REST = 0.35, 0.5
"""SD of what a method does on an item in every seed, and by chance, where items differ from each other by SD 1."""


def study(
    rng: np.random.Generator,
    *,
    methods: int,
    seeds: int,
    items: int,
    seed_noise: float = 0.0,
    better_by: float = 0.0,
    graded: bool = False,
    noisy: str | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Scores (seeds, items) of ``base``, ``lora`` and other methods, near one half.

    An item is right where difficulty, method and chance come to more than 0; graded, the score is their normal
    distribution function.

    Args:
        rng: Where chance comes from.
        methods: Methods besides base and LoRA.
        seeds: Seeds of each.
        items: Test items.
        seed_noise: SD of what a seed adds to the score of a method, a share of 1.
        better_by: How much the expected score of ``m0`` is above that of all others, right/wrong, a share of 1.
        graded: Whether scores are graded.
        noisy: A method to whose score a seed adds five times as much.
    """
    seed_sd = seed_noise * (2 * np.pi * (1 + ITEM**2 + REST**2)) ** 0.5
    whole = (1 + ITEM**2 + REST**2 + seed_sd**2) ** 0.5
    difficulty = rng.normal(size=items)
    found = {}
    for name in ("base", "lora", *(f"m{i}" for i in range(methods))):
        rows = 1 if name == "base" else seeds
        latent = difficulty + rng.normal(size=items) * ITEM + rng.normal(size=(rows, items)) * REST
        latent += rng.normal(size=(rows, 1)) * seed_sd * (5 if name == noisy else 1)
        latent += whole * special.ndtri(0.5 + better_by) * (name == "m0")
        found[name] = special.ndtr(latent) if graded else (latent > 0).astype(float)
    return found
