"""How one method is tuned: the grid, halving, widening, and that it depends on what was measured alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from ftune.experiments.tuning import Outcome, Progress, Setting, grid, next_wants, steps_of_tuning

TOTAL = 40
Loss = Callable[[Setting, int], float]


def tuned(
    loss: Loss, *, trials: int = 5, failing: frozenset[int] = frozenset()
) -> tuple[Outcome, list[tuple[int, int]]]:
    """Do what is wanted until there is an outcome; returns it, and the training that was done: (exponent, until)."""
    done: dict[Setting, Progress] = {}
    trained: list[tuple[int, int]] = []
    for _ in range(100):
        wants, outcome = next_wants(1e-3, trials, {}, TOTAL, done)
        if outcome is not None:
            assert not wants
            return outcome, trained
        want = wants[0]  # one at a time, as one worker does
        before = done.get(want.setting, Progress())
        if want.setting.exponent in failing:
            done[want.setting] = Progress(before.losses, "diverged")
        elif want.until is None:
            done[want.setting] = Progress(before.losses, None, 1 / (1 + loss(want.setting, TOTAL)))
        else:
            trained.append((want.setting.exponent, want.until))
            done[want.setting] = Progress({**before.losses, want.until: loss(want.setting, want.until)})
    raise AssertionError("tuning does not end")


def bowl(best: int) -> Loss:
    return lambda setting, step: abs(setting.exponent - best) + 1 / step


def test_rates_are_half_a_power_of_ten_apart_around_the_prior() -> None:
    assert [setting.rate for setting in grid(1e-3, 5, {})] == [1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2]
    assert [setting.exponent for setting in grid(1e-3, 4, {})] == [-1, 0, 1, 2]


def test_other_fields_are_tried_with_every_rate() -> None:
    settings = grid(1e-3, 3, {"method.rank": (8, 32), "optimizer.weight_decay": (0.0, 0.1)})
    assert len(settings) == 12
    assert len({setting.name for setting in settings}) == 12


def test_half_of_the_trials_go_on_at_each_rung_and_none_is_trained_twice() -> None:
    outcome, trained = tuned(bowl(1))
    assert [until for _, until in trained] == [10] * 5 + [20] * 3 + [40] * 2
    assert {exponent for exponent, until in trained if until == 40} <= {0, 1, 2}
    assert len(set(trained)) == len(trained)
    assert outcome.best is not None
    assert outcome.best.exponent == 1
    assert not outcome.at_edge
    steps = sum({10: 10, 20: 10, 40: 20}[until] for _, until in trained)
    assert steps == steps_of_tuning(5, 1, TOTAL)


def test_a_best_rate_at_the_edge_widens_the_grid_once() -> None:
    outcome, trained = tuned(bowl(3))
    assert outcome.best is not None
    assert outcome.best.exponent == 3
    assert not outcome.at_edge
    assert {exponent for exponent, _ in trained} == {-2, -1, 0, 1, 2, 3, 4}
    assert tuned(bowl(-3))[0].best.exponent == -3  # type: ignore[union-attr]


@pytest.mark.parametrize("best", [9, -9])
def test_a_best_rate_that_stays_at_the_edge_is_not_tuned(best: int) -> None:
    outcome, _ = tuned(bowl(best))
    assert outcome.at_edge


def test_a_trial_that_diverges_is_replaced_by_the_next_best() -> None:
    outcome, trained = tuned(bowl(0), failing=frozenset({2, 1}))
    assert outcome.best is not None
    assert outcome.best.exponent == 0
    assert len({exponent for exponent, until in trained if until == TOTAL}) == 2


def test_where_every_trial_fails_there_is_no_best() -> None:
    assert tuned(bowl(0), failing=frozenset(range(-9, 9)))[0].best is None


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    outcome, _ = tuned(lambda setting, step: math.nan if setting.exponent > 0 else bowl(0)(setting, step))
    assert outcome.best is not None
    assert outcome.best.exponent == 0


def test_the_metric_decides_before_the_loss() -> None:
    settings = grid(1e-3, 3, {})
    losses = {10: 1.0, 20: 1.0, 40: 1.0}
    done = {s: Progress({step: loss - 0.1 * i for step, loss in losses.items()}) for i, s in enumerate(settings)}
    wants, _ = next_wants(1e-3, 3, {}, TOTAL, done)
    assert [want.until for want in wants] == [None, None]
    done[settings[2]] = Progress(done[settings[2]].losses, None, 0.5)
    done[settings[1]] = Progress(done[settings[1]].losses, None, 0.6)
    assert next_wants(1e-3, 3, {}, TOTAL, done)[1].best == settings[1]  # type: ignore[union-attr]


@pytest.mark.parametrize("total", [1, 2, 3, 5, 7])
def test_runs_of_few_steps_are_tuned_too(total: int) -> None:
    done: dict[Setting, Progress] = {}
    for _ in range(100):
        wants, outcome = next_wants(1e-3, 5, {}, total, done)
        if outcome is not None:
            break
        for want in wants:
            before = done.get(want.setting, Progress()).losses
            done[want.setting] = (
                Progress(before, None, 1.0)
                if want.until is None
                else Progress({**before, want.until: abs(want.setting.exponent) + 1.0})
            )
    assert outcome is not None
    assert outcome.best is not None
    assert outcome.best.exponent == 0
