"""The difference of two methods, paired by item and seed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import stats

from ftune.artifacts.paired import Spread, checked, difference, paired
from ftune.errors import FtuneError


def right_wrong(won: int, lost: int, same: int) -> np.ndarray:
    """Differences of one seed, of which so many are won and so many lost."""
    return np.array([[1.0] * won + [-1.0] * lost + [0.0] * same])


def test_right_or_wrong_with_one_seed_is_tested_exactly() -> None:
    found = difference(right_wrong(10, 2, 28))
    assert found.p == round(2 * (1 + 12 + 66) / 2**12, 6)  # at most 2 of 12 fair coins, both sides
    for won, lost in ((0, 0), (3, 3), (0, 9), (70, 40)):
        exact = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
        assert difference(right_wrong(won, lost, 5)).p == pytest.approx(exact, abs=1e-6)
    assert found.d == 0.2
    assert found.seeds == 1


def test_the_interval_counts_an_item_won_and_an_item_lost_more() -> None:
    found = difference(right_wrong(10, 2, 28))
    more = stats.ttest_1samp([1.0] * 11 + [-1.0] * 3 + [0.0] * 28, 0).confidence_interval(0.95)
    assert (found.lo, found.hi) == pytest.approx(tuple(more), abs=1e-6)


def test_no_item_that_differs_is_no_certainty() -> None:
    few, many = difference(right_wrong(0, 0, 20)), difference(right_wrong(0, 0, 2000))
    assert (few.d, few.p) == (0.0, 1.0)
    assert few.hi == pytest.approx(0.136, abs=0.001)  # 3 of 20 items may differ unseen
    assert many.hi < 0.0015


def test_seeds_alone_are_a_t_test_over_seeds() -> None:
    by_seed = np.array([[0.1], [0.2], [0.4]])
    found = difference(np.broadcast_to(by_seed, (3, 5000)))
    assert (found.lo, found.hi) == pytest.approx(
        tuple(stats.ttest_1samp(by_seed[:, 0], 0).confidence_interval(0.95)), abs=2e-3
    )
    assert found.p == pytest.approx(stats.ttest_1samp(by_seed[:, 0], 0).pvalue, abs=2e-3)
    assert found.spread == Spread(round(float(by_seed.std(ddof=1)), 6), 0.0, 0.0)


def test_items_alone_are_a_t_test_over_items() -> None:
    by_item = np.random.default_rng(0).uniform(-0.4, 0.5, size=3000)
    found = difference(np.tile(by_item, (3, 1)))
    assert (found.lo, found.hi) == pytest.approx(tuple(stats.ttest_1samp(by_item, 0).confidence_interval()), abs=5e-4)
    assert found.spread == Spread(0.0, round(float(by_item.std(ddof=1)), 6), 0.0)


def test_the_spread_is_what_made_the_differences() -> None:
    rng = np.random.default_rng(0)
    truth = Spread(0.02, 0.08, 0.1)
    d_SN = rng.normal(size=(400, 1)) * 0.02 + rng.normal(size=1000) * 0.08 + rng.normal(size=(400, 1000)) * 0.1
    found = difference(d_SN).spread
    assert (found.seed, found.item, found.rest) == pytest.approx((truth.seed, truth.item, truth.rest), rel=0.08)


def test_which_is_first_and_the_order_of_seeds_and_items_change_nothing() -> None:
    rng = np.random.default_rng(1)
    d_SN = rng.uniform(-1, 1, size=(3, 50))
    found, turned = difference(d_SN), difference(-d_SN)
    assert (turned.d, turned.lo, turned.hi) == pytest.approx((-found.d, -found.hi, -found.lo), abs=1e-9)
    assert turned.p == found.p
    assert difference(d_SN[::-1, rng.permutation(50)]) == found


def test_a_failed_run_leaves_its_seed_out_of_both() -> None:
    x_SN, y_SN = np.random.default_rng(2).uniform(size=(2, 4, 30))
    x_SN[0] = np.nan
    assert (paired(x_SN, y_SN) == x_SN[1:] - y_SN[1:]).all()
    y_SN[1:] = np.nan
    with pytest.raises(ValueError, match="share no seed"):
        paired(x_SN, y_SN)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dora": [[1, 0, 1]]}, "not the same seeds"),
        ({"dora": [[1, 0], [0, 1]]}, "not the same seeds"),
        ({"base": [[1, 0]]}, "not the same items"),
        ({"base": [[1, 0, 1], [1, 0, 1]]}, "`base`: the base has one row, not 2"),
        ({"dora": [[1, 0, 1], [1, 0, 1.1]]}, "`dora`: every score"),
        ({"dora": [[1, 0, 1], [1, 0, np.nan]]}, "`dora`: every score"),
        ({"dora": [[np.nan] * 3] * 2}, "`dora`: every score"),
        ({"dora": [1, 0, 1]}, r"`dora`: scores of shape \(3,\)"),
    ],
)
def test_scores_that_do_not_fit_together_are_refused(changed: dict[str, list[list[float]]], message: str) -> None:
    scores = {"base": [[0, 0, 1]], "lora": [[1, 1, 0], [1, 0, 1]], "dora": [[1, 0, 1], [0, 1, 1]]}
    assert list(checked(scores, "base")) == ["base", "dora", "lora"]
    with pytest.raises(ValueError, match=message):
        checked(scores | changed, "base")


def test_without_scipy_the_line_that_installs_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(FtuneError, match="a comparison needs scipy") as caught:
        difference(right_wrong(3, 2, 5))
    assert caught.value.help == "pip install 'ftune[compare]'"
