"""What a study will take and what it can show, before it begins; and the length of its runs that fits its budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ftune.errors import FtuneError
from ftune.experiments.rewind import MOST_POINTS
from ftune.experiments.settle import Settled
from ftune.experiments.study import BASE, Budget, LoadedStudy
from ftune.experiments.times import times
from ftune.experiments.trials import Trials
from ftune.experiments.tuning import SURVIVORS, steps_of_tuning
from ftune.human import time_text

__all__ = ["Forecast", "fitted", "make_forecast"]

FEWEST_STEPS = 20
"""Steps of a run below which a study is not cut to fit a budget."""

FORGETTING_TOKENS = 2 * 14_000
"""Tokens of the neutral texts and questions (``ftune.artifacts.forgetting``), which the base reads too."""
READING = 0.7
"""What reading a token costs of a step's time for one, by the quickest method: 0.8 in a study of a 135M model."""


@dataclass(frozen=True)
class Forecast:
    """What a study will take, before it begins.

    Attributes:
        settled: What its runs have in common.
        labels: The methods that take part.
        runs: Runs that are trained, whole or in part.
        steps: Steps of all of them.
        seconds: The time of all of them, on one device, by steps that were measured.
        besides: What of it is not steps, so that shorter runs do not save it: answers, loading, saving.
        speed: Of each method seconds of a step and bytes of its peak.
        detectable: The difference that can be shown with 80 % power, a share of 1.
        needed: Test rows with which the margin could be shown; None: not with any number, for these seeds.
        cut_from: Steps of a run as the recipe has it, where the budget allows fewer.
        begun: Whether the study has begun before.
        tasks: Tasks that are run besides; their time is not known.
    """

    settled: Settled
    labels: tuple[str, ...]
    runs: int
    steps: int
    seconds: float
    besides: float
    speed: Mapping[str, Mapping[str, float]]
    detectable: float
    needed: int | None
    cut_from: int | None
    begun: bool
    tasks: tuple[str, ...] = ()


def make_forecast(
    loaded: LoadedStudy,
    settled: Settled,
    trials: Trials,
    speeds: Mapping[str, Mapping[str, float]],
    *,
    begun: bool,
    cut_from: int | None = None,
) -> Forecast:
    """What a study will take, by what was measured of it.

    Args:
        loaded: The study.
        settled: What its runs have in common.
        trials: Its runs.
        speeds: Of each method seconds of a step and bytes of its peak.
        begun: Whether it has begun before.
        cut_from: Steps of a run as the recipe has it, where the budget allows fewer.
    """
    from ftune.artifacts.paired import Spread
    from ftune.experiments.power import detectable, needed

    study = loaded.study
    combinations = math.prod(len(values) for values in study.search.values())
    steps = steps_of_tuning(study.trials, combinations, settled.steps) + (study.seeds - 1) * settled.steps
    labels = tuple(candidate.label for candidate in loaded.candidates if candidate.label in settled.priors)
    mean = sum(speed["seconds"] for speed in speeds.values()) / max(1, len(speeds))
    training = sum(steps * speeds.get(label, {"seconds": mean})["seconds"] for label in labels)
    validation = settled.counts.get("validation") or settled.test_items
    reading = trials.result(BASE, BASE).get("seconds", 0.0) / max(1, settled.test_items)
    jobs = len(labels) * (2 * study.trials * combinations + 2 * SURVIVORS + 2 * study.seeds)
    answers = len(labels) * (2 * validation + study.seeds * settled.test_items)
    if study.rewind:
        jobs += len(labels) * MOST_POINTS
        answers += len(labels) * MOST_POINTS * validation
    spread, comparisons = Spread.assumed(), max(1, len(labels))  # the others and the base against LoRA
    besides = answers * reading + jobs * times(trials.root)["job"]
    if study.forgetting and speeds:
        a_token = min(speed["seconds"] for speed in speeds.values()) / settled.tokens_a_step
        besides += len(labels) * FORGETTING_TOKENS * READING * a_token
    return Forecast(
        settled=settled,
        labels=labels,
        runs=len(labels) * (study.trials * combinations + study.seeds - 1),
        steps=len(labels) * steps,
        seconds=training + besides,
        besides=besides,
        speed=speeds,
        detectable=detectable(settled.test_items, spread, study.seeds, comparisons=comparisons),
        needed=needed(study.margin / 100, spread, study.seeds, comparisons=comparisons),
        cut_from=cut_from,
        begun=begun,
        tasks=study.tasks,
    )


def fitted(forecast: Forecast, budget: str | None) -> int:
    """Steps of a run with which a study fits its budget.

    Args:
        forecast: What it takes.
        budget: As the study has it; None: whatever it takes.

    Raises:
        FtuneError: It does not fit with as few as make sense.
    """
    now = forecast.settled.steps
    if budget is None:
        return now
    asked = Budget.read(budget)
    tokens = forecast.steps * forecast.settled.tokens_a_step
    needs = {"seconds": forecast.seconds, "steps": forecast.steps, "tokens": tokens}[asked.unit]
    if needs <= asked.amount:
        return now
    besides = forecast.besides if asked.unit == "seconds" else 0.0
    steps = max(0, math.floor(now * (asked.amount - besides) / (needs - besides)))
    if steps < min(FEWEST_STEPS, now):
        count = len(forecast.labels)
        fits = max(0, math.floor(count * asked.amount / needs))
        how = {"seconds": time_text(needs)}.get(asked.unit, f"{needs:,.0f} {asked.unit}")
        raise FtuneError(
            f"the study needs {how}, and its budget is {budget}: runs of {steps} steps would show nothing",
            help=f"compare fewer methods ({fits} of these {count} fit), or give a larger budget"
            if fits >= 2
            else "give a larger budget, or fewer methods, trials or seeds",
        )
    return steps
