"""The verdict, in each of its forms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from experiments_studies import study
from numpy.typing import NDArray

from ftune.experiments.sentence import Verdict
from ftune.experiments.ties import holm, tie_groups
from ftune.experiments.verdict import judge

ITEMS = 1000


def scores(*, seeds: int = 3, noise: float = 0.0, flips: int = 10, **right: int) -> dict[str, NDArray[np.float64]]:
    """Scores of methods that have so many items of 1,000 right: the first ones, some of them by chance and not others.

    Args:
        seeds: Seeds of each but the base.
        noise: SD of what a seed changes in the number of right items, a share.
        flips: Items that a run has otherwise than the method, as many won as lost.
        right: Of each method the items that it has right.
    """
    rng = np.random.default_rng(0)
    found = {}
    for name, count in right.items():
        rows = []
        for _ in range(1 if name == "base" else seeds):
            level = count + round(noise * ITEMS * rng.normal())
            row = (np.arange(ITEMS) < level).astype(float)
            row[rng.choice(level, flips, replace=False)] = 0
            row[level + rng.choice(ITEMS - level, flips, replace=False)] = 1
            rows.append(row)
        found[name] = np.array(rows)
    return found


def ruled(of: dict[str, NDArray[np.float64]], **options: object) -> Verdict:
    return judge(of, **{"base": "base", "reference": "lora", "margin": 0.01} | options)  # type: ignore[arg-type]


def test_one_method_is_better() -> None:
    verdict = ruled(scores(base=300, lora=500, dora=560, vera=420))
    assert (verdict.kind, verdict.take, verdict.group, verdict.scope) == ("better", "dora", ("dora",), "the methods")
    assert verdict.beats_base == ("dora", "lora", "vera")
    assert verdict.ties == (("dora",), ("lora",), ("vera",), ("base",))
    d = verdict.comparisons["dora"].difference
    assert 0.03 < d.lo < 0.06 < d.hi < 0.09
    lo, hi = f"{100 * d.lo:.1f}", f"{100 * d.hi:.1f}"
    assert verdict.sentence() == f"dora is better than lora by {100 * d.d:.1f} points [{lo}, {hi}]."


def test_of_the_best_the_cheapest_is_taken() -> None:
    of = scores(base=300, lora=500, dora=560, oft=558, ia3=530, vera=420)
    costs = {
        "lora": {"memory": 1.0, "time": 5.0},
        "dora": {"memory": 3.0, "time": 3.0},
        "oft": {"memory": 2.0, "time": 4.0},
        "ia3": {"memory": 0.5, "time": 1.0},
    }
    verdict = ruled(of, costs=costs)
    assert (verdict.kind, verdict.take, verdict.prefer) == ("better", "oft", "memory")
    assert set(verdict.group) == {"dora", "oft"}  # ia3 is better than lora, but worse than these
    assert verdict.sentence().endswith("not told apart, it takes the least memory.")
    assert ruled(of, costs=costs, prefer="time").take == "dora"
    assert ruled(of, costs=costs, prefer="size").prefer is None


def test_the_reference_is_better_than_every_other() -> None:
    verdict = ruled(scores(base=300, lora=500, dora=440, vera=420))
    assert (verdict.kind, verdict.take, verdict.group) == ("better", "lora", ("lora",))
    assert verdict.sentence().startswith("lora is better than every other; the nearest, dora, is worse by 6.")
    alone = ruled(scores(base=300, lora=500))
    assert alone.sentence().startswith("lora is better than base by 2")


def test_a_certain_difference_that_does_not_matter_is_a_tie() -> None:
    of = scores(base=300, lora=500, dora=512, ia3=501, flips=0)
    assert ruled(of, margin=0.002).kind == "better"
    verdict = ruled(of, margin=0.02, costs={"lora": {"memory": 2.0}, "dora": {"memory": 3.0}, "ia3": {"memory": 1.0}})
    assert verdict.comparisons["dora"].adjusted_p < 0.05  # type: ignore[operator]
    assert (verdict.kind, verdict.take, verdict.group) == ("tied", "ia3", ("dora", "ia3", "lora"))
    assert (
        verdict.sentence() == "dora, ia3 and lora are tied within 2.0 points: take ia3, which takes the least memory."
    )


def test_the_base_may_be_the_answer() -> None:
    tied = ruled(scores(base=500, lora=500, dora=501, flips=0), costs={"lora": {"memory": 2.0}})
    assert (tied.kind, tied.take, tied.beats_base) == ("tied", "base", ())
    assert tied.sentence().endswith("take base, which needs no training.")
    better = ruled(scores(base=560, lora=500, dora=501))
    assert (better.kind, better.take) == ("better", "base")
    unsure = ruled(scores(base=530, lora=500, dora=535, flips=1))
    assert (unsure.kind, unsure.take, unsure.group) == ("better", "base", ("dora", "base"))


def test_that_no_method_beats_the_base_is_said() -> None:
    of = scores(base=480, lora=440, dora=510, flips=40)
    of["base"] = of["base"][:, ::-1]  # right and wrong elsewhere, so that its difference is not known well
    verdict = ruled(of)
    assert (verdict.kind, verdict.take) == ("better", "dora")
    assert verdict.sentence().endswith("; no method is shown to beat the base.")


def test_not_enough_items() -> None:
    verdict = ruled(scores(base=300, lora=500, dora=508, flips=30), margin=0.02)
    assert (verdict.kind, verdict.take, verdict.more_seeds) == ("not enough data", None, None)
    assert verdict.more_items is not None
    assert 1000 < verdict.more_items < 20_000
    assert verdict.sentence() == (
        f"Not enough data to tell dora from lora: it takes about {verdict.more_items:,} more items."
    )


def test_not_enough_seeds() -> None:
    verdict = ruled(scores(base=300, lora=500, dora=520, noise=0.03), margin=0.05)
    assert (verdict.kind, verdict.more_items) == ("not enough data", None)
    assert verdict.more_seeds is not None
    assert verdict.more_seeds > 3
    assert (
        f"{verdict.more_seeds} more seeds of each method, since seeds differ too much for items to help"
        in verdict.sentence()
    )


def test_with_one_seed_the_verdict_is_about_these_runs() -> None:
    verdict = ruled(scores(base=300, lora=500, dora=560, seeds=1))
    assert (verdict.kind, verdict.scope) == ("better", "these runs")
    assert verdict.sentence().startswith("In these runs, of one seed: dora is better than lora by 6.0 points [")


def test_what_is_not_tuned_is_not_ranked() -> None:
    of = scores(base=300, lora=500, dora=560, vera=420)
    verdict = ruled(of, not_tuned=["dora"])
    assert (verdict.kind, verdict.take) == ("better", "lora")
    assert verdict.comparisons["dora"].relation is None
    assert verdict.comparisons["dora"].adjusted_p is None
    assert verdict.comparisons["dora"].difference.d > 0.05
    assert verdict.sentence().endswith(" (not ranked, since not tuned: dora).")
    without = ruled(of, not_tuned=["lora"])
    assert (without.kind, without.take) == ("not enough data", None)
    assert without.sentence() == "Not enough data: lora, which the others are compared with, is not tuned."


def test_the_order_of_the_methods_changes_nothing() -> None:
    of = study(np.random.default_rng(0), methods=4, seeds=3, items=200)
    first, second = ruled(of), ruled(dict(reversed(of.items())))
    assert json.dumps(first.as_json()) == json.dumps(second.as_json())
    assert json.loads(json.dumps(first.as_json()))["sentence"] == first.sentence()


def test_a_margin_in_points_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.01 for one point"):
        ruled(scores(base=300, lora=500), margin=1.0)


def test_holm_multiplies_by_those_that_are_left() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_a_method_between_two_is_in_both_groups() -> None:
    of = scores(base=300, low=500, middle=511, high=530)
    assert tie_groups(of, base="base") == (("high",), ("middle", "low"), ("base",))
    of = scores(base=300, low=500, middle=512, high=524)
    assert tie_groups(of, base="base") == (("high", "middle"), ("middle", "low"), ("base",))
