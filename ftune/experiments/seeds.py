"""How much seeds add to a difference, learned from all methods of a study together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from ftune.artifacts.need import need
from ftune.artifacts.paired import Difference, Pair, Scores, difference, paired

__all__ = ["SeedNoise", "differences", "moderated", "of_pairs"]

NONE = 1e-12
"""A variance of seeds that is none, but for rounding: a standard deviation of a ten-thousandth of a point."""


def differences(known: Mapping[str, Scores], pairs: Iterable[Pair], alpha: float) -> dict[Pair, Difference]:
    """The first of each pair less the second.

    Args:
        known: (S, N) of each method, all of one study.
        pairs: Their names.
        alpha: Each interval covers ``1 - alpha``.
    """
    noise = SeedNoise(known)
    return {(x, y): difference(paired(known[x], known[y]), alpha, noise.of((x, y))) for x, y in pairs}


class SeedNoise:
    """The variance that a seed adds to the difference of two methods, moderated by that of all pairs.

    Two or three seeds often agree by chance, and a method then seems to be better for certain. So the variance of
    a pair is drawn towards what is typical.

    Args:
        known: (S, N) of each method; the base, which has one row, tells nothing here.
    """

    def __init__(self, known: Mapping[str, Scores]) -> None:
        self.names = [name for name, x_SN in known.items() if len(x_SN) > 1]
        table_KS = np.array([known[name].mean(axis=1) for name in self.names] or [[0.0]])
        self.table_KS: NDArray[np.float64] = table_KS[:, ~np.isnan(table_KS).any(axis=0)]

    def of(self, pair: Pair) -> tuple[float, float] | None:
        """The variance, and its degrees of freedom.

        Against the base, what a seed (the order of the data) adds to all methods counts; it makes their variances
        alike, so that the others add no degrees of freedom. None where fewer than two seeds ended in all methods.
        """
        methods, seeds = self.table_KS.shape
        if seeds < 2:
            return None
        found = [self.names.index(name) for name in pair if name in self.names]
        if len(found) == 1:
            of_each = self.table_KS.var(axis=-1, ddof=1)
            variance, _ = moderated(of_each[found[0]], of_each, methods, seeds)
            return float(variance), seeds - 1.0
        own = np.subtract(*self.table_KS[found]).var(ddof=1)
        variance, degrees = moderated(own, of_pairs(self.table_KS), methods, seeds)
        return float(variance), degrees


def of_pairs(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., P): the variance over seeds of the difference of each pair, of a table (..., K, S) of mean scores."""
    x, y = np.triu_indices(table.shape[-2], 1)
    found: NDArray[np.float64] = (table[..., x, :] - table[..., y, :]).var(axis=-1, ddof=1)
    return found


def moderated(
    own: NDArray[np.float64], every: NDArray[np.float64], methods: int, seeds: int
) -> tuple[NDArray[np.float64], float]:
    """A variance drawn towards the geometric mean of all, and its degrees of freedom.

    A weighted mean (Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3:3, sec. 4). There the weight of the others is
    estimated; a handful of methods cannot tell it, so here it is (K - 2) / K, K methods, to the own one's 1
    (docs/statistics.md: calibration). One wild method moves a geometric mean little.

    Args:
        own: (...), one or several variances.
        every: (..., P), those of all pairs.
        methods: K.
        seeds: S.
    """
    weight = max(0.0, 1 - 2 / methods)
    half = (seeds - 1) / 2
    some = every > NONE
    logs = np.where(some, np.log(np.where(some, every, 1)), 0)
    count = some.sum(axis=-1)
    # the logarithm of a variance known from few degrees of freedom is on average too low
    typical = np.exp(logs.sum(axis=-1) / np.maximum(count, 1) - need("scipy.special").digamma(half) + np.log(half))
    return (own + weight * np.where(count > 0, typical, 0)) / (1 + weight), (seeds - 1) * (1 + weight)
