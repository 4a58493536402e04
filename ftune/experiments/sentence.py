"""A verdict as a value, and in one sentence of plain English."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ftune.artifacts.paired import Difference
from ftune.experiments.against import Comparison, related

__all__ = ["Cost", "Kind", "Verdict", "sentence"]

Kind = Literal["better", "tied", "not enough data"]
Cost = Literal["memory", "time", "size"]


@dataclass(frozen=True)
class Verdict:
    """What a study says; differences are shares of 1.

    Attributes:
        kind: The form of the verdict.
        take: The method to take; None where that is not known.
        group: Those it was chosen from, best first: the best and those not told apart from it, or those that tie.
        scope: Whether it is about the methods or, where one was run with one seed, about these runs.
        reference: What the methods were compared with.
        base: The name of the base.
        margin: The least difference that matters.
        prefer: What decided between the methods of the group; None where no costs were known.
        items: Test items.
        comparisons: Every other method against the reference, the base included.
        beats_base: Methods that are better than the base, for certain, best first.
        not_tuned: Methods that are not ranked.
        ties: Groups of ranked methods that are not told apart, best first.
        detectable: The difference from the reference that this study could show with 80 % power, by the noise that
            was measured: the largest over the ranked methods but the base. None where there are none.
        more_items: Items besides those there are that would settle what is open, to two digits; None where items would
            not.
        more_seeds: Seeds besides those there are that would, where items would not.
    """

    kind: Kind
    take: str | None
    group: tuple[str, ...]
    scope: Literal["the methods", "these runs"]
    reference: str
    base: str
    margin: float
    prefer: Cost | None
    items: int
    comparisons: dict[str, Comparison]
    beats_base: tuple[str, ...]
    not_tuned: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    detectable: float | None
    more_items: int | None
    more_seeds: int | None

    def as_json(self) -> dict[str, Any]:
        """A plain dict, the same on every machine."""
        return {**asdict(self), "sentence": self.sentence()}

    def sentence(self) -> str:
        """The verdict in one sentence."""
        return sentence(self)


_LEAST = {"memory": "takes the least memory", "time": "takes the least time", "size": "is the smallest on disk"}


def sentence(verdict: Verdict) -> str:
    """The form of the verdict, what to take and why, and what the reader must know besides."""
    said = {"better": _better, "tied": _tied, "not enough data": _open}[verdict.kind](verdict)
    if verdict.kind != "not enough data" and verdict.take != verdict.base:
        if not verdict.beats_base:
            said += "; no method is shown to beat the base"
        elif verdict.take not in verdict.beats_base:
            said += f"; it is not shown to beat the base, unlike {_and(verdict.beats_base)}"
    others = [name for name in verdict.not_tuned if name != verdict.reference]
    if others:
        said += f" (not ranked, since not tuned: {', '.join(others)})"
    if verdict.scope == "these runs":
        said = f"in these runs, of one seed: {said}"
    # a sentence that begins with a method's name keeps it as it is
    return f"{said[0].upper() if said.startswith(('in ', 'not ')) else said[0]}{said[1:]}."


def _better(verdict: Verdict) -> str:
    take = str(verdict.take)
    if take == verdict.reference:
        others = related(verdict.comparisons, "worse")
        d = verdict.comparisons[others[0]].difference
        turned = Difference(-d.d, -d.hi, -d.lo, d.p, d.seeds, d.spread)
        if len(others) == 1:
            return f"{take} is better than {others[0]} by {_points(turned)}"
        return f"{take} is better than every other; the nearest, {others[0]}, is worse by {_points(turned)}"
    said = f"{take} is better than {verdict.reference} by {_points(verdict.comparisons[take].difference)}"
    if len(verdict.group) == 1:
        return said
    return f"{said}; of {_and(verdict.group)}, not told apart, it {_why(verdict)}"


def _tied(verdict: Verdict) -> str:
    margin = f"{100 * verdict.margin:.1f} points"
    return f"{_and(verdict.group)} are tied within {margin}: take {verdict.take}, which {_why(verdict)}"


def _open(verdict: Verdict) -> str:
    unsettled = related(verdict.comparisons, "open")
    if not unsettled:
        return f"not enough data: {verdict.reference}, which the others are compared with, is not tuned"
    more = [
        f"{count:,} more {what}"
        for count, what in ((verdict.more_items, "items"), (verdict.more_seeds, "seeds of each method"))
        if count
    ]
    said = f"not enough data to tell {_and(unsettled)} from {verdict.reference}"
    if not more:
        return f"{said}: neither more items nor 100 seeds would settle it, so choose a larger margin"
    said += f": it takes about {' and '.join(more)}"
    return f"{said}, since seeds differ too much for items to help" if verdict.more_seeds else said


def _why(verdict: Verdict) -> str:
    if verdict.take == verdict.base:
        return "needs no training"
    return _LEAST[verdict.prefer] if verdict.prefer else "is the best of them so far"


def _points(d: Difference) -> str:
    # 0.0 is added since a minus before a rounded zero says nothing
    middle, lo, hi = (round(100 * share, 1) + 0.0 for share in (d.d, d.lo, d.hi))
    return f"{middle:.1f} points [{lo:.1f}, {hi:.1f}]"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
