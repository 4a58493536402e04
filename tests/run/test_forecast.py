"""The time of a run, foretold from its first updates."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

from ftune.run.events import EvalEnd, Event, Forecast, RunStart, Saved, StepEnd
from ftune.run.forecast import Forecaster, predict_seconds
from ftune.run.sinks.progress import ProgressSink


def step_end(step: int, tokens: int, seconds: float) -> StepEnd:
    return StepEnd(step, 1.0, 1e-3, 1.0, tokens, tokens // 2, tokens / seconds, 0, seconds, 0.0)


def run(
    updates: Sequence[tuple[int, float]],
    forecaster: Forecaster,
    *,
    start: int = 0,
    save: float = 0.0,
    eval: float = 0.0,
) -> tuple[list[Forecast], float]:
    """Make a run of these updates; its forecasts, and how long it took."""
    total = start + len(updates)
    forecasts, spent = [], 0.0

    def emit(event: Event, seconds: float = 0.0) -> None:
        nonlocal spent
        spent += seconds
        if found := forecaster.after(event):
            forecasts.append(found)

    emit(RunStart(start, total))
    for step, (tokens, seconds) in enumerate(updates, start + 1):
        emit(step_end(step, tokens, seconds), seconds)
        if step in forecaster.save_steps:
            emit(Saved(step, f"step-{step}", save), save)
        if step in forecaster.eval_steps:
            emit(EvalEnd(step, 1.0, 2.7, 10, eval), eval)
    assert forecaster.spent == pytest.approx(spent)
    return forecasts, spent


def test_the_pace_is_that_of_tokens_in_the_second_half() -> None:
    # 50 tokens/s after an update that took ten times as long
    updates = [(100, 20.0), (200, 4.0), (50, 1.0)]
    assert predict_seconds(updates, tokens_ahead=1000) == pytest.approx(25 + 20)
    assert predict_seconds(updates, tokens_ahead=1000, other_spent=3, other_ahead=4) == pytest.approx(52)


def test_updates_that_record_graphs_are_no_measure() -> None:
    updates = [(100, 9.0), (100, 3.0), (100, 3.0), *[(100, 1.0)] * 7]
    assert predict_seconds(updates, tokens_ahead=1000) == pytest.approx(22 + 10)


def test_a_single_update_is_all_there_is() -> None:
    assert predict_seconds([(100, 20.0)], tokens_ahead=100) == pytest.approx(40)
    with pytest.raises(ValueError, match="no update"):
        predict_seconds([], tokens_ahead=100)


def test_uneven_updates_are_foretold_within_a_tenth() -> None:
    generator = random.Random(3)
    sizes = [generator.randint(400, 1600) for _ in range(200)]
    updates = [
        (size, size / 300 * generator.uniform(0.8, 1.2) + (5 if index == 0 else 0)) for index, size in enumerate(sizes)
    ]
    (forecast,), took = run(updates, Forecaster(sum(sizes) / len(sizes), 0, (), (200,)))
    assert (forecast.step, forecast.updates) == (10, 10)
    assert forecast.seconds == pytest.approx(took, rel=0.1)


def test_evaluations_and_checkpoints_are_counted() -> None:
    updates = [(100, 1.0)] * 40
    every_4 = range(4, 41, 4)
    (forecast,), took = run(updates, Forecaster(100, 1000, every_4, every_4), save=2.0, eval=7.0)
    assert forecast.seconds == pytest.approx(took) == pytest.approx(40 + 10 * 9)


def test_an_evaluation_that_was_not_made_yet_costs_a_forward_pass() -> None:
    (forecast,), took = run([(100, 1.0)] * 40, Forecaster(100, 2000, (40,), (40,)), eval=10.0)
    assert forecast.seconds == pytest.approx(took) == pytest.approx(50)


def test_a_checkpoint_due_after_the_last_measured_update_is_still_ahead() -> None:
    (forecast,), took = run([(100, 1.0)] * 30, Forecaster(100, 0, (), (5, 10, 30)), save=30.0)
    assert forecast.seconds == pytest.approx(took) == pytest.approx(30 + 90)


@pytest.mark.parametrize(
    ("updates", "steps"), [(1, []), (2, []), (3, [2]), (16, [5]), (33, [10]), (40, [10]), (500, [10])]
)
def test_short_runs_are_foretold_earlier_and_the_shortest_not_at_all(updates: int, steps: list[int]) -> None:
    forecasts, _ = run([(100, 1.0)] * updates, Forecaster(100, 0, (), (updates,)))
    assert [forecast.step for forecast in forecasts] == steps


def test_a_resumed_run_foretells_its_own_part() -> None:
    (forecast,), took = run([(100, 1.0)] * 40, Forecaster(100, 0, (), (1000,)), start=960)
    assert (forecast.step, forecast.updates) == (970, 10)
    assert forecast.seconds == pytest.approx(took) == pytest.approx(40)


def test_progress_shows_it() -> None:
    out = io.StringIO()
    ProgressSink(out, live=False).receive(Forecast(10, 185.0, 10))
    assert out.getvalue() == "step 10: about 3m05s in all, by the first 10 updates\n"


def test_a_run_keeps_what_was_foretold_beside_what_it_took(tmp_path: Path) -> None:
    from ftune.artifacts.training import train

    measured = train(tiny.recipe(tmp_path, training={"max_steps": 9}))["measured"]
    (event,) = tiny.events(tmp_path / "run", "forecast")
    assert (event["step"], event["seconds"]) == (3, measured["predicted_loop_seconds"])
    assert measured["training_seconds"] < measured["loop_seconds"] < measured["wall_seconds"]
    assert json.loads((tmp_path / "run/run.json").read_text())["measured"] == measured
