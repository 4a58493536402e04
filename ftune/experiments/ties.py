"""Many comparisons at once: Holm's correction, and the groups of methods that are not told apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ftune.artifacts.paired import checked, stable
from ftune.experiments.seeds import differences

__all__ = ["holm", "tie_groups"]

Name = TypeVar("Name", str, tuple[str, str])


def holm(p: Mapping[Name, float]) -> dict[Name, float]:
    """Adjusted p-values: below alpha, they hold together with an error of at most alpha.

    Source: Holm 1979, Scand. J. Stat. 6:65.
    """
    adjusted: dict[Name, float] = {}
    worst = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: (p[name], name))):
        worst = max(worst, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = stable(worst)
    return adjusted


def tie_groups(scores: Mapping[str, ArrayLike], *, base: str, alpha: float = 0.05) -> tuple[tuple[str, ...], ...]:
    """The largest groups of methods of which no two are told apart, best first, for the letters of a table.

    A method may be in several. All pairs are compared, with Holm's correction over them.
    Source: Piepho 2004, J. Comput. Graph. Stat. 13:456, insert and absorb.

    Args:
        scores: (S, N) of each method; see ``paired.Scores``.
        base: The one that has one row.
        alpha: Level of all pairs together.
    """
    known = checked(scores, base)
    means = {name: stable(np.nanmean(x_SN)) for name, x_SN in known.items()}
    ranks = {name: rank for rank, name in enumerate(sorted(known, key=lambda name: (-means[name], name)))}
    pairs = list(itertools.combinations(ranks, 2))
    adjusted = holm({pair: d.p for pair, d in differences(known, pairs, alpha).items()})
    groups = {frozenset(ranks)}
    for pair in pairs:
        if adjusted[pair] < alpha:
            split = {group - {one} if group.issuperset(pair) else group for group in groups for one in pair}
            groups = {group for group in split if not any(group < other for other in split)}
    ordered = [tuple(sorted(group, key=ranks.__getitem__)) for group in groups]
    return tuple(sorted(ordered, key=lambda group: [ranks[name] for name in group]))
