"""What is shown while a run goes on: something from the start, and little in a log."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from ftune.artifacts import training
from ftune.artifacts.training import train
from ftune.human import time_text
from ftune.run.events import EvalEnd, Event, RunStart, Saved, StepEnd, Working
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


def drawn(text: str) -> list[str]:
    """What a terminal was shown, line after line, without the bar."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    return [re.sub(r"\s*[━╸╺]+\s*", "  ", line).strip() for line in text.splitlines() if line.strip()]


def test_a_terminal_shows_the_first_update_as_it_goes_on(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = drawn(first_update(clock, 80, live=True))
    assert "step 0/40  measuring the held-out loss" in lines
    parts = [line for line in lines if "of 8 micro-batches" in line]
    assert parts == [f"step 1/40  {micro} of 8 micro-batches  {time_text(10 * micro)}" for micro in range(8)]
    last = "step 1/40  loss 2.0000  ETA 52m00s  10 tok/s  peak 1 MiB  lr 1.00e-03"
    assert lines[-1] == last, "39 updates of 80 s: the evaluation before them is no update"


@pytest.mark.parametrize(
    ("columns", "said"), [(80, "10 tok/s  peak 1 MiB  lr 1.00e-03"), (72, "peak 1 MiB"), (60, "tok/s"), (40, "loss")]
)
def test_a_narrow_terminal_is_shown_less(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, columns: int, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", first_update(clock, 8, live=True)).replace("\r", "\n")
    assert max(len(line) for line in text.splitlines() if "━" in line) <= columns
    assert said in drawn(text)[-1]
    assert "━" * progress.NARROWEST_BAR in text.splitlines()[-1]


@pytest.mark.parametrize(("name", "value", "colour", "bar"), [("NO_COLOR", "1", 0, 1), ("TERM", "dumb", 0, 0)])
def test_a_terminal_without_colour_or_of_no_abilities(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, name: str, value: str, colour: int, bar: int
) -> None:
    monkeypatch.setenv(name, value)
    out = io.StringIO()
    sink = ProgressSink(out, live=True)
    sink.receive(RunStart(0, 40))
    sink.receive(replace(STEP, step=40))
    sink.close()
    text = out.getvalue()
    assert (bool(re.search(r"\x1b\[[0-9;]*3[0-9]", text)), "━" in text) == (colour, bar)


def test_what_was_not_drawn_for_haste_is_drawn_at_the_end(clock: list[float]) -> None:
    out = io.StringIO()
    sink = ProgressSink(out, live=True)
    sink.receive(RunStart(0, 40))
    for step in range(1, 8):
        sink.receive(replace(STEP, step=step))
    assert "step 7/40" not in out.getvalue()
    sink.receive(Saved(7, "checkpoints/step-7"))
    sink.close()
    lines = drawn(out.getvalue())
    assert "step 7: saved checkpoints/step-7" in lines
    assert lines[-1].startswith("step 7/40")


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
