"""The difference of two methods on the same test items, with an interval that covers items and seeds.

Shapes: S seeds, N items. Scores are shares of 1, so 0.01 is one point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ftune.artifacts.need import need

__all__ = ["Difference", "Pair", "Scores", "Spread", "checked", "difference", "paired", "stable"]

Scores = NDArray[np.float64]
"""(S, N): the scores of one method, 0 to 1, right/wrong or graded; a row of NaN is a seed whose run failed.
The items come in one order for all methods, and so do the seeds. The base, which no seed touches, has one row."""
Pair = tuple[str, str]


@dataclass(frozen=True)
class Spread:
    """What makes a difference of two methods vary: standard deviations, in shares of 1.

    The model is that of two crossed random factors, ``d[s, i] = mean + seed[s] + item[i] + rest[s, i]``, so that
    the mean over S seeds and N items varies by ``seed**2 / S + item**2 / N + rest**2 / (S * N)``.

    Attributes:
        seed: Of what a seed adds to every item; more items do not average it out. 0 where one seed was run.
        item: Of what an item adds in every seed; more seeds do not average it out. With one seed, rest is in it.
        rest: Of what is neither.
    """

    seed: float
    item: float
    rest: float

    @classmethod
    def assumed(cls, seed: float = 0.0) -> Spread:
        """What to expect of right/wrong scores near one half before anything was run.

        Two tuned models are taken to differ on 15 % of the items: on 10 % by chance and on 5 % in every seed.
        The 10 % are those of two runs of one configuration in PEFT's comparison of methods on GSM8K, whose
        accuracies differ by SD 0.6 points each: ``2 * 0.006**2 * 1319 = 0.095``.

        Args:
            seed: SD of what a seed adds to a difference. Not 0 where there are few updates: another seed moved the
                score of a run of 24 updates by 17 to 23 points.
        """
        return cls(seed, 0.05**0.5, 0.10**0.5)


@dataclass(frozen=True)
class Difference:
    """One method less another, over the same items and seeds; rounded, so that every machine has the same.

    Attributes:
        d: Mean of the differences.
        lo: Lower end of the interval at ``1 - alpha``.
        hi: Its upper end.
        p: Two-sided p-value of no difference.
        seeds: Seeds that both have.
        spread: What the differences vary by.
    """

    d: float
    lo: float
    hi: float
    p: float
    seeds: int
    spread: Spread


def checked(scores: Mapping[str, ArrayLike], base: str) -> dict[str, Scores]:
    """The scores as matrices, in the order of the names.

    Raises:
        ValueError: They are not of one shape (but for the base's one row), not within 0 to 1, or a method has none.
    """
    found: dict[str, Scores] = {}
    for name in sorted(scores):
        x_SN = np.asarray(scores[name], dtype=np.float64)
        if x_SN.ndim != 2 or x_SN.shape[1] < 2:
            raise ValueError(f"`{name}`: scores of shape {x_SN.shape}, not (seeds, items) with two items or more")
        failed = np.isnan(x_SN).all(axis=1)
        if failed.all() or not ((x_SN >= 0) & (x_SN <= 1))[~failed].all():
            raise ValueError(f"`{name}`: every score must be within 0 to 1, and a failed run a whole row of NaN")
        found[name] = x_SN
    if found[base].shape[0] != 1:
        raise ValueError(f"`{base}`: the base has one row, not {found[base].shape[0]}")
    if len({x_SN.shape for name, x_SN in found.items() if name != base}) > 1:
        raise ValueError("the methods have not the same seeds")
    if len({x_SN.shape[1] for x_SN in found.values()}) > 1:
        raise ValueError("the methods have not the same items")
    return found


def paired(x_SN: Scores, y_SN: Scores) -> Scores:
    """(S, N): x less y, of the seeds whose runs ended in both; the base's row goes with every seed."""
    d_SN = x_SN - y_SN
    d_SN = d_SN[~np.isnan(d_SN).any(axis=1)]
    if not len(d_SN):
        raise ValueError("two methods share no seed whose runs ended")
    return d_SN


def difference(d_SN: Scores, alpha: float = 0.05, by_seed: tuple[float, float] | None = None) -> Difference:
    """The mean of paired differences, with its interval and p-value.

    Several seeds: Student's t. The variance of the mean is made of the mean squares of seeds, items and rest,
    ``(max(seed, rest) + max(item - rest, 0)) / (S * N)``, with Satterthwaite's degrees of freedom: the model for
    readers who judge the same cases (Obuchowski & Rockette 1995, Commun. Stat. Simul. 24:285; Hillis 2007, Stat.
    Med. 26:596), with seeds for readers. One seed: the same of items alone; right/wrong scores are tested exactly.

    The normal approximation fails where few items differ, and says "no difference, for certain" where none does.
    So the interval and the p-value count two more items, one won and one lost by as much as any (Bonett & Price
    2012, J. Educ. Behav. Stat. 37:479, the Laplace-adjusted Wald interval; recommended by Fagerland, Lydersen &
    Laake 2014, Stat. Med. 33:2850).

    Args:
        d_SN: (S, N), each -1 to 1; where none but -1, 0 and 1 occur, the scores were right/wrong.
        alpha: The interval covers ``1 - alpha``.
        by_seed: The variance that a seed adds, and its degrees of freedom, where more is known of them than these
            differences tell (see ``seeds.SeedNoise``).
    """
    seeds, items = d_SN.shape
    special = need("scipy.special")
    most = float(np.abs(d_SN).max()) or 1.0
    more_SM = np.concatenate([d_SN, np.tile([most, -most], (seeds, 1))], axis=1)
    seed, item, rest = mean_squares(more_SM)
    if by_seed:
        seed = by_seed[0] * items**2 / (items + 2)
    of_seeds = max(seed, rest) / more_SM.size if seeds > 1 else 0.0
    of_items = max(item - rest, 0.0) / more_SM.size
    degrees = freedom(of_seeds, of_items, by_seed[1] if by_seed else max(seeds - 1, 1), items + 1)
    centre, error = float(more_SM.mean()), (of_seeds + of_items) ** 0.5
    half = float(special.stdtrit(degrees, 1 - alpha / 2)) * error
    if seeds == 1 and np.isin(d_SN, (-1, 0, 1)).all():
        # McNemar 1947, Psychometrika 12:153: of the items that differ as many are won as lost
        won, lost = int((d_SN > 0).sum()), int((d_SN < 0).sum())
        p = min(1.0, 2 * float(special.bdtr(min(won, lost), won + lost, 0.5)))
    else:
        p = 2 * float(special.stdtr(degrees, -abs(centre) / error))
    seed, item, rest = mean_squares(d_SN)
    spread = Spread(*(stable(max(v, 0.0) ** 0.5) for v in ((seed - rest) / items, (item - rest) / seeds, rest)))
    lo, hi = max(centre - half, -1.0), min(centre + half, 1.0)
    return Difference(stable(d_SN.mean()), stable(lo), stable(hi), stable(p), seeds, spread)


def mean_squares(d_SN: Scores) -> tuple[float, float, float]:
    """The mean squares of seeds, of items, and of the rest (their interaction).

    With one seed the first is 0, and so is the last: what varies is the items'.
    """
    seeds, items = d_SN.shape
    mean = d_SN.mean()
    seed = items * float(((d_SN.mean(axis=1) - mean) ** 2).sum())
    item = seeds * float(((d_SN.mean(axis=0) - mean) ** 2).sum())
    if seeds == 1:
        return 0.0, item / (items - 1), 0.0
    rest = max(float(((d_SN - mean) ** 2).sum()) - seed - item, 0.0)
    return seed / (seeds - 1), item / (items - 1), rest / ((seeds - 1) * (items - 1))


def freedom(of_seeds: Any, of_items: Any, seed_degrees: Any, item_degrees: float) -> Any:
    """Satterthwaite's degrees of freedom of a variance that is the sum of two parts (Biometrics 1946, 2:110).

    Args:
        of_seeds: The part of the variance that seeds add.
        of_items: The part that items add.
        seed_degrees: Degrees of freedom from which the first is known.
        item_degrees: Degrees of freedom from which the second is known.
    """
    return (of_seeds + of_items) ** 2 / (of_seeds**2 / seed_degrees + of_items**2 / item_degrees)


def stable(value: Any) -> float:
    """Six decimals; ten first, since the last bits of a sum depend on the processor."""
    return round(round(float(value), 10), 6) + 0.0
