"""How one method is tuned: the grid of its learning rate, and what to train next. Pure: no file, no clock.

Every method gets the same number of trials, at rates half a power of ten apart around its own prior. They are halved
within the method alone (successive halving, Jamieson and Talwalkar, arXiv:1502.07943, sec. 3): all are trained for a
quarter of the steps, the best half of them for half, the best two to the end; a trial that goes on is resumed, so that
no step is made twice. A best trial at the edge of the grid widens it once by two rates; one that is still at the edge
is not tuned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

__all__ = ["SURVIVORS", "WIDENED", "Outcome", "Progress", "Setting", "Want", "grid", "next_wants", "steps_of_tuning"]

STRIDE = math.sqrt(10)
"""One rate of the grid over the one below it."""
WIDENED = 2
"""Rates that are added beyond an edge."""
SURVIVORS = 2
"""Trials that are trained to the end."""


@dataclass(frozen=True)
class Setting:
    """One trial.

    Attributes:
        exponent: The rate is the prior's times ``STRIDE`` to this power.
        rate: The learning rate, two digits of it.
        fields: Other fields that are tried, as ``(path, value)``.
    """

    exponent: int
    rate: float
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """A name for its files: ``rate-2e-04``, with the other fields' values behind it."""
        others = [f"{path.rpartition('.')[2]}-{value}" for path, value in self.fields]
        return "-".join([f"rate-{self.rate:.1e}".replace(".0e", "e"), *others])


@dataclass(frozen=True)
class Progress:
    """How far a trial has come.

    Attributes:
        losses: Held-out loss after so many steps.
        failed: Why it cannot go on.
        quality: The metric on the validation rows, once it is trained to the end; higher is better.
    """

    losses: Mapping[int, float] = field(default_factory=dict)
    failed: str | None = None
    quality: float | None = None


@dataclass(frozen=True)
class Want:
    """What to do next.

    Attributes:
        setting: Of this trial.
        until: Train it up to this step; None: measure its quality.
    """

    setting: Setting
    until: int | None


@dataclass(frozen=True)
class Outcome:
    """What tuning found.

    Attributes:
        best: The chosen setting; None where every trial failed.
        at_edge: Whether its rate is still at the edge of the grid that was widened: the method is not tuned.
        tried: All settings, by rate.
    """

    best: Setting | None
    at_edge: bool
    tried: tuple[Setting, ...]


def grid(prior: float, trials: int, search: Mapping[str, Sequence[Any]], *, wider: int = 0) -> list[Setting]:
    """The settings to try: rates around the prior, each with every combination of the other fields.

    An even number of rates has one more above the prior than below: a rate too low is the commoner fault.

    Args:
        prior: The rate in the middle.
        trials: Rates.
        search: Other fields with their values.
        wider: Rates besides, at either end.
    """
    first = -((trials - 1) // 2)
    exponents = range(first - wider, first + trials + wider)
    return [setting for exponent in exponents for setting in _with_fields(prior, exponent, search)]


def next_wants(
    prior: float,
    trials: int,
    search: Mapping[str, Sequence[Any]],
    total: int,
    done: Mapping[Setting, Progress],
) -> tuple[list[Want], Outcome | None]:
    """What must still be done for a method, or what tuning found.

    Args:
        prior: The method's own rate for so many steps.
        trials: Rates on its grid.
        search: Other fields with their values.
        total: Steps of a run.
        done: How far each trial has come; one that is not in it has not begun.

    Returns:
        What to do next, all of which can be done side by side; or none of it, and the outcome.
    """
    settings = grid(prior, trials, search)
    wants = list(_halved(settings, total, done, SURVIVORS))
    if wants:
        return wants, None
    best = _best(settings, total, done)
    if best is None:
        return [], Outcome(None, False, tuple(settings))
    lowest, highest = settings[0].exponent, settings[-1].exponent
    if best.exponent not in (lowest, highest):
        return [], Outcome(best, False, tuple(settings))
    sign, edge = (-1, lowest) if best.exponent == lowest else (1, highest)
    beyond = [edge + sign * (i + 1) for i in range(WIDENED)]
    wider = [setting for exponent in beyond for setting in _with_fields(prior, exponent, dict(_as_search(best)))]
    wants = list(_halved(wider, total, done, 1))
    if wants:
        return wants, None
    everything = sorted([*settings, *wider], key=lambda setting: (setting.exponent, setting.name))
    best = _best(everything, total, done)
    assert best is not None
    return [], Outcome(best, best.exponent == beyond[-1], tuple(everything))


def steps_of_tuning(trials: int, combinations: int, total: int) -> int:
    """Steps that tuning one method takes, where its grid need not be widened."""
    count, made, steps = trials * combinations, 0, 0
    for rung, keep in _rungs(count, total, SURVIVORS):
        steps += keep * (rung - made)
        made = rung
    return steps


def _with_fields(prior: float, exponent: int, search: Mapping[str, Sequence[Any]]) -> list[Setting]:
    rate = float(f"{prior * STRIDE**exponent:.1e}")
    return [Setting(exponent, rate, tuple(zip(search, values, strict=True))) for values in product(*search.values())]


def _as_search(setting: Setting) -> Iterator[tuple[str, tuple[Any, ...]]]:
    return ((path, (value,)) for path, value in setting.fields)


def _rungs(count: int, total: int, survivors: int) -> list[tuple[int, int]]:
    """Steps up to which trials are trained, and how many of them: all, half of them, the survivors."""
    rungs = [(math.ceil(total / 4), count), (math.ceil(total / 2), max(survivors, math.ceil(count / 2)))]
    return [*((step, min(keep, count)) for step, keep in rungs if step < total), (total, min(survivors, count))]


def _halved(
    settings: Sequence[Setting], total: int, done: Mapping[Setting, Progress], survivors: int
) -> Iterator[Want]:
    """What successive halving of these trials still needs, up to the first rung that is not reached by all."""
    before: int | None = None
    alive = list(settings)
    for step, keep in _rungs(len(settings), total, survivors):
        alive = [setting for setting in alive if _progress(done, setting).failed is None]
        if before is not None:
            alive.sort(key=lambda setting, at=before: _loss(done[setting], at))  # type: ignore[misc]
            alive = alive[:keep]
        missing = [setting for setting in alive if step not in _progress(done, setting).losses]
        if missing:
            yield from (Want(setting, step) for setting in missing)
            return
        before = step
    yield from (Want(setting, None) for setting in alive if done[setting].quality is None)


def _progress(done: Mapping[Setting, Progress], setting: Setting) -> Progress:
    return done.get(setting, Progress())


def _loss(progress: Progress, step: int) -> float:
    """The held-out loss at a rung; one that is no number is the worst."""
    loss = progress.losses[step]
    return loss if math.isfinite(loss) else math.inf


def _best(settings: Sequence[Setting], total: int, done: Mapping[Setting, Progress]) -> Setting | None:
    """The trial of the best quality, then of the lowest held-out loss, then of the lowest rate."""
    ended = [
        setting
        for setting in settings
        if (progress := _progress(done, setting)).failed is None and progress.quality is not None
    ]
    return min(
        ended,
        key=lambda setting: (-(done[setting].quality or 0.0), _loss(done[setting], total), setting.exponent),
        default=None,
    )
