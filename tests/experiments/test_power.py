"""What a study can show, before it is run and after."""

from __future__ import annotations

import pytest

from ftune.artifacts.paired import Spread
from ftune.experiments.power import detectable, needed, needed_seeds, power_of

ASSUMED = Spread.assumed()


def test_1319_items_can_show_3_points() -> None:
    assert f"{100 * detectable(1319, ASSUMED, 1):.1f}" == "3.1"


def test_more_items_more_seeds_and_fewer_methods_show_less() -> None:
    one = detectable(1000, ASSUMED, 3)
    assert detectable(4000, ASSUMED, 3) == pytest.approx(one / 2, rel=0.02)
    assert detectable(1000, ASSUMED, 5) < one < detectable(1000, ASSUMED, 2)
    assert detectable(1000, ASSUMED, 3, comparisons=5) > one
    assert detectable(10, ASSUMED, 1, comparisons=5) == 1.0


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_the_items_needed_are_those_that_show_it(seeds: int) -> None:
    spread = Spread.assumed(seed=0.002 if seeds > 2 else 0.0)
    items = needed(0.03, spread, seeds, comparisons=4)
    assert items is not None
    assert power_of(0.03, items, spread, seeds, comparisons=4) >= 0.8
    assert power_of(0.03, items - 2, spread, seeds, comparisons=4) < 0.8
    assert detectable(items, spread, seeds, comparisons=4) == pytest.approx(0.03, abs=2e-4)


def test_where_seeds_vary_too_much_seeds_are_needed_and_no_items() -> None:
    spread = Spread.assumed(seed=0.05)
    assert needed(0.03, spread, 3) is None
    seeds = needed_seeds(0.03, 10_000, spread)
    assert seeds is not None
    assert 20 < seeds < 40  # (2.8 * 0.05 / 0.03)**2 = 22, and what the items add
    assert power_of(0.03, 10_000, spread, seeds) >= 0.8 > power_of(0.03, 10_000, spread, seeds - 1)
    assert needed_seeds(0.03, 50, spread) is None


def test_no_difference_is_found_half_as_often_as_alpha_says_on_either_side() -> None:
    assert power_of(0.0, 100_000, ASSUMED, 1) == pytest.approx(0.025, abs=1e-3)
