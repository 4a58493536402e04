"""Which difference a test can show, and what it takes to show one; shares of 1, so 0.01 is one point."""

from __future__ import annotations

import bisect
import functools

import numpy as np
from numpy.typing import NDArray

from ftune.artifacts.need import need
from ftune.artifacts.paired import Spread, freedom
from ftune.experiments.seeds import moderated, of_pairs

__all__ = ["detectable", "needed", "needed_seeds", "power_of"]

MOST_ITEMS = 1_000_000
"""Where this many items are too few, items are not what is missing."""
MOST_SEEDS = 100


def power_of(
    delta: float, n_items: int, spread: Spread, seeds: int, *, alpha: float = 0.05, comparisons: int = 1
) -> float:
    """The chance that a difference of delta is found: a p-value below alpha, and the right sign.

    The mean is taken to be normal, and what seeds add to the variance of each method, which few seeds tell badly, to
    follow chi-square, over which the chance is averaged; with several methods it is moderated by that of the others,
    as in ``seeds.SeedNoise``. One seed of right/wrong scores is tested exactly, which costs half a won item on each
    side (the continuity correction: Connor 1987, Biometrics 43:207).

    Args:
        delta: The true difference, a share of 1.
        n_items: Test items.
        spread: What differences vary by: assumed, or as a study measured it.
        seeds: Seeds of each method; with 1, ``spread.seed`` is left out, as it is in the test.
        alpha: Level of all the comparisons together, two-sided.
        comparisons: Methods that are compared with the reference; Holm's first step divides alpha by it.
    """
    return _Test(n_items, spread, seeds, alpha, comparisons).power(delta)


def detectable(
    n_items: int, spread: Spread, seeds: int, *, alpha: float = 0.05, power: float = 0.8, comparisons: int = 1
) -> float:
    """The least difference that is found with the given power, in steps of a hundredth of a point; at most 1.

    ``detectable(1319, Spread.assumed(), 1)`` is 0.0309: 3.1 points.

    Args:
        n_items: Test items.
        spread: See ``power_of``.
        seeds: Seeds of each method.
        alpha: See ``power_of``.
        power: The chance to find it.
        comparisons: See ``power_of``.
    """
    test, steps = _Test(n_items, spread, seeds, alpha, comparisons), range(1, 10_000)
    return (1 + bisect.bisect_left(steps, power, key=lambda step: test.power(step / 10_000))) / 10_000


def needed(
    delta: float, spread: Spread, seeds: int, *, alpha: float = 0.05, power: float = 0.8, comparisons: int = 1
) -> int | None:
    """The fewest items with which delta is found with the given power; other arguments as in ``detectable``.

    None where a million are too few: what seeds add is too large, so more seeds are needed.
    """
    amounts = range(2, MOST_ITEMS + 1)
    at = bisect.bisect_left(
        amounts,
        power,
        key=lambda n_items: power_of(delta, n_items, spread, seeds, alpha=alpha, comparisons=comparisons),
    )
    return amounts[at] if at < len(amounts) else None


def needed_seeds(
    delta: float, n_items: int, spread: Spread, *, alpha: float = 0.05, power: float = 0.8, comparisons: int = 1
) -> int | None:
    """The fewest seeds of each method with which delta is found with so many items; None where 100 are too few."""
    amounts = range(2, MOST_SEEDS + 1)
    at = bisect.bisect_left(
        amounts, power, key=lambda seeds: power_of(delta, n_items, spread, seeds, alpha=alpha, comparisons=comparisons)
    )
    return amounts[at] if at < len(amounts) else None


class _Test:
    """``paired.difference`` on so many items and seeds: the mean against what it must exceed, in standard errors."""

    def __init__(self, n_items: int, spread: Spread, seeds: int, alpha: float, comparisons: int) -> None:
        self.special = need("scipy.special")
        rest = spread.rest**2 / (n_items * seeds)
        of_items = spread.item**2 / n_items + 2 / n_items**2  # the two items that are added
        of_seeds = spread.seed**2 / seeds + rest
        if seeds == 1:
            of_seeds, of_items, rest = 0.0, of_items + rest, 0.0
        times, degrees = _drawn(seeds, comparisons)
        drawn = np.maximum(of_seeds * times, rest)
        self.error = (of_seeds + of_items) ** 0.5
        student = self.special.stdtrit(freedom(drawn, of_items, degrees, n_items + 1), 1 - alpha / comparisons / 2)
        self.limits = student * (drawn + of_items) ** 0.5 / self.error
        self.shrunk, self.lost = n_items / (n_items + 2), (seeds == 1) / n_items

    def power(self, delta: float) -> float:
        """The chance to find a true difference of delta."""
        return float(self.special.ndtr((delta * self.shrunk - self.lost) / self.error - self.limits).mean())


@functools.cache
def _drawn(seeds: int, comparisons: int) -> tuple[NDArray[np.float64], float]:
    """What ``seeds.SeedNoise`` finds a variance of 1 to be, as 100 equal chances, and its degrees of freedom.

    From 2,000 studies whose methods are as noisy as each other. The methods are as many as the comparisons: the
    reference is one more, and the base, which has no seeds, is none.
    """
    if seeds == 1:
        return np.ones(1), 1.0
    methods = max(2, comparisons)
    table = need("scipy.special").ndtri(np.random.default_rng(0).random((2000, methods, seeds)))
    every = of_pairs(table) / 2
    variance, degrees = moderated(every[:, 0], every, methods, seeds)
    return np.sort(variance).reshape(100, 20).mean(axis=1), degrees
