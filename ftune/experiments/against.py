"""Every method against one of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ftune.artifacts.paired import Difference, Scores, stable
from ftune.experiments.seeds import differences
from ftune.experiments.ties import holm

__all__ = ["Comparison", "Relation", "beat", "compare", "related"]

Relation = Literal["better", "worse", "same", "open"]


@dataclass(frozen=True)
class Comparison:
    """One method against the reference.

    Attributes:
        mean: Its mean score.
        difference: Its score less the reference's.
        adjusted_p: Holm's p-value over all that are ranked; None where it is not ranked.
        relation: ``same``: the interval lies within the margin; ``better`` or ``worse``: it does not, and leaves out
            0, and Holm's p-value is below alpha; else ``open``. None where the method is not ranked.
    """

    mean: float
    difference: Difference
    adjusted_p: float | None
    relation: Relation | None


def compare(
    known: Mapping[str, Scores], ranked: Collection[str], reference: str, margin: float, alpha: float
) -> dict[str, Comparison]:
    """Every method but the reference against it; none is ranked where the reference is not.

    Args:
        known: (S, N) of each method.
        ranked: The methods that are ranked.
        reference: Its name.
        margin: The least difference that matters, a share of 1.
        alpha: Level of all of them together; each interval is at ``1 - alpha`` for itself.
    """
    found = _against(known, reference, alpha)
    adjusted = holm({name: d.p for name, d in found.items() if name in ranked and reference in ranked})

    def relation(name: str) -> Relation | None:
        d = found[name]
        if name not in adjusted:
            return None
        if -margin <= d.lo and d.hi <= margin:
            return "same"
        if adjusted[name] >= alpha or d.lo <= 0 <= d.hi:
            return "open"
        return "better" if d.lo > 0 else "worse"

    return {
        name: Comparison(stable(np.nanmean(known[name])), d, adjusted.get(name), relation(name))
        for name, d in found.items()
    }


def related(comparisons: Mapping[str, Comparison], *relations: Relation) -> list[str]:
    """The methods that so relate to the reference, best first."""
    found = [name for name, one in comparisons.items() if one.relation in relations]
    return sorted(found, key=lambda name: (-comparisons[name].difference.d, name))


def beat(known: Mapping[str, Scores], base: str, alpha: float) -> tuple[str, ...]:
    """The methods whose score is above the base's for certain (Holm over them), best first."""
    found = _against(known, base, alpha)
    adjusted = holm({name: d.p for name, d in found.items()})
    above = [name for name, d in found.items() if adjusted[name] < alpha and d.d > 0]
    return tuple(sorted(above, key=lambda name: (-found[name].d, name)))


def _against(known: Mapping[str, Scores], one: str, alpha: float) -> dict[str, Difference]:
    pairs = [(name, one) for name in known if name != one]
    return {name: d for (name, _), d in differences(known, pairs, alpha).items()}
