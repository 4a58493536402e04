"""What is shown while a run goes on: something from the start, and little in a log."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import tiny

from ftune.artifacts import training
from ftune.artifacts.training import train
from ftune.human import time_text
from ftune.run.events import EvalEnd, Event, RunStart, StepEnd, Working
from ftune.run.sinks import progress
from ftune.run.sinks.progress import ProgressSink

STEP = StepEnd(1, 2.0, 1e-3, 1.0, 100, 50, 10.0, 2**20, 10.0, 0.1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def first_update(clock: list[float], seconds: float, *, live: bool) -> str:
    out = io.StringIO()
    sink = ProgressSink(out, live=live)
    sink.receive(RunStart(0, 40))
    sink.receive(Working(0, "held-out loss"))
    clock[0] += 50
    sink.receive(EvalEnd(0, 3.0, 20.0, 10, 50.0))
    for micro in range(8):
        sink.receive(Working(0, "update", micro, 8))
        clock[0] += seconds / 8
    sink.receive(STEP)
    sink.close()
    return out.getvalue()


def test_a_terminal_shows_the_first_update_as_it_goes_on(clock: list[float]) -> None:
    lines = first_update(clock, 80, live=True).replace("\n", "").split("\r\x1b[2K")
    assert "step 0/40  measuring the held-out loss" in lines
    assert [f"step 1/40  {micro} of 8 micro-batches  {time_text(10 * micro)}" for micro in range(8)] == lines[3:11]
    assert "ETA 52m00s" in lines[11], "39 updates of 80 s: the evaluation before them is no update"


@pytest.mark.parametrize(("seconds", "said"), [(80, ["step 1/40  1 of 8 micro-batches  10s"]), (8, [])])
def test_a_log_gets_one_line_where_the_first_update_is_long(clock: list[float], seconds: int, said: list[str]) -> None:
    lines = first_update(clock, seconds, live=False).splitlines()
    assert [line for line in lines if "micro-batch" in line] == said
    assert len(lines) == 2 + len(said)


def test_only_the_first_update_tells_of_its_parts_and_no_log_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Event] = []

    class Watch(ProgressSink):
        def receive(self, event: Event) -> None:
            seen.append(event)

    monkeypatch.setattr(training, "ProgressSink", Watch)
    train(tiny.recipe(tmp_path, tracking=["progress", "jsonl"], training={"micro_batch_tokens": 1}))
    parts = [event for event in seen if isinstance(event, Working) and event.what == "update"]
    assert [(event.step, event.done, event.of) for event in parts] == [(0, 0, 2), (0, 1, 2)]
    assert not tiny.events(tmp_path / "run", "working")
