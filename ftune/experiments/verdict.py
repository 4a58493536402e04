"""The verdict of a study: better, tied, or not enough data (docs/statistics.md says how, and why so)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike

from ftune.artifacts.paired import Difference, checked
from ftune.experiments.against import Comparison, beat, compare, related
from ftune.experiments.power import detectable, needed, needed_seeds
from ftune.experiments.sentence import Cost, Kind, Verdict
from ftune.experiments.ties import tie_groups

__all__ = ["judge"]


def judge(
    scores: Mapping[str, ArrayLike],
    *,
    base: str,
    reference: str,
    margin: float,
    costs: Mapping[str, Mapping[str, float]] | None = None,
    prefer: Cost = "memory",
    not_tuned: Collection[str] = (),
    alpha: float = 0.05,
) -> Verdict:
    """Say whether another method beats the reference.

    A method is better where Holm's p-value is below alpha and its interval does not lie within the margin; of the
    best and those not told apart from it the cheapest is taken. Where each of the others is worse, the reference is
    better. All tie where the interval of each that is not worse lies within the margin (two one-sided tests:
    Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657; of all at once by intersection-union, Berger 1982,
    Technometrics 24:295, with no correction). Else there is not enough data.

    Args:
        scores: (S, N) of each method; see ``paired.Scores``.
        base: The method that has one row: a contender like the others, which costs nothing.
        reference: The method that the others are compared with.
        margin: The least difference that matters, a share of 1: 0.01 is one point.
        costs: Of each method its ``memory``, ``time`` and ``size``, in any unit.
        prefer: Which of them decides between methods that are not told apart.
        not_tuned: Methods whose best rate is at the edge of its grid: compared, and not ranked.
        alpha: Level of all comparisons together; each interval is at ``1 - alpha`` for itself.

    Raises:
        ValueError: The scores do not fit together (see ``paired.checked``), or the margin is not a share of 1.
        FtuneError: scipy is not installed.
    """
    if not 0 < margin < 0.5:
        raise ValueError(f"margin {margin}: it is a share of 1, such as 0.01 for one point")
    known = checked(scores, base)
    ranked = {name: x_SN for name, x_SN in known.items() if name not in not_tuned}
    comparisons = compare(known, ranked, reference, margin, alpha)
    family = {name: one.difference for name, one in comparisons.items() if one.relation}
    level: dict[str, Any] = {"alpha": alpha, "comparisons": len(family)}
    ties = tie_groups(ranked, base=base, alpha=alpha)
    kind, group = _form(comparisons, reference, ties)
    items = known[base].shape[1]
    unsettled = [one.difference for one in comparisons.values() if one.relation == "open"]
    more_items, more_seeds = _missing(unsettled if kind == "not enough data" else [], items, margin, level)
    prices = {name: cost[prefer] for name, cost in (costs or {}).items() if prefer in cost} | {base: 0.0}
    priced = [name for name in group if name in prices]
    return Verdict(
        kind=kind,
        take=min(priced, key=lambda name: (prices[name], name != reference)) if priced else (*group, None)[0],
        group=group,
        scope="the methods" if all(d.seeds > 1 for d in family.values()) else "these runs",
        reference=reference,
        base=base,
        margin=margin,
        prefer=prefer if priced else None,
        items=items,
        comparisons=comparisons,
        beats_base=beat(ranked, base, alpha),
        not_tuned=tuple(sorted(not_tuned)),
        ties=ties,
        detectable=max(
            (detectable(items, d.spread, d.seeds, **level) for x, d in family.items() if x != base), default=None
        ),
        more_items=more_items,
        more_seeds=more_seeds,
    )


def _form(
    comparisons: Mapping[str, Comparison], reference: str, ties: Sequence[Collection[str]]
) -> tuple[Kind, tuple[str, ...]]:
    """The form of the verdict, and the methods of which one is to be taken, best first."""
    better, same = related(comparisons, "better"), related(comparisons, "same")
    if better:
        return "better", tuple(x for x in better if any({x, better[0]} <= set(group) for group in ties))
    if related(comparisons, "open") or not related(comparisons, "same", "worse"):
        return "not enough data", ()
    if not same:
        return "better", (reference,)
    ahead = [name for name in same if comparisons[name].difference.d > 0]
    return "tied", (*ahead, reference, *(name for name in same if name not in ahead))


def _missing(
    unsettled: Collection[Difference], items: int, margin: float, level: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    """The items besides those there are that would settle every difference, and the seeds where items would not.

    Settled is one whose interval leaves out 0, or lies within the margin: whichever is nearer to what was measured.
    """
    more_items, more_seeds = [0], [0]
    for one in unsettled:
        delta = min(margin, max(abs(one.d), margin - abs(one.d)))
        enough = needed(delta, one.spread, one.seeds, **level)
        if enough is not None:
            more_items.append(max(enough - items, 1))
            continue
        seeds = needed_seeds(delta, items, one.spread, **level)
        if seeds is None:
            return None, None
        more_seeds.append(max(seeds - one.seeds, 1))
    return _about(max(more_items)) or None, max(more_seeds) or None


def _about(count: int) -> int:
    """Two digits of it, rounded up."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit
