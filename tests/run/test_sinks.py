"""What listens to a run may fail: the run is not lost, and what was not kept is said."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from ftune.artifacts.training import train
from ftune.run.events import RunStart, Saved, StepEnd
from ftune.run.sinks.guarded import Guarded
from ftune.run.sinks.jsonl import JsonlSink, read_events
from ftune.run.sinks.progress import ProgressSink

STEP = StepEnd(1, 0.5, 1e-3, 1.0, 10, 5, 100.0, 1000, 0.1, 0.5)


class Failing(GeneralTracker):
    """A tracker that fails where ``at`` says."""

    name = "wandb"
    requires_logging_directory = False
    at = ""
    error: BaseException = RuntimeError("the service is away\nand much more")
    logged: list[int] = []

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self._try("start")

    def _try(self, where: str) -> None:
        if self.at == where:
            raise self.error

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._try("configuration")

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step is not None and step >= 2:
            self._try("log")
        self.logged.append(step or 0)

    def finish(self) -> None:
        self._try("finish")


@pytest.mark.parametrize(
    ("at", "error", "lost", "said"),
    [
        ("start", RuntimeError("not logged in\nmore"), 6, "could not be started"),
        ("start", SystemExit(1), 6, "could not be started"),
        ("configuration", OSError(errno.ECONNREFUSED, "Connection refused"), 6, "could not be started"),
        ("log", RuntimeError("HTTP 500"), 4, "failed after step 2"),
        ("finish", RuntimeError("cannot flush"), 0, "could not be closed"),
    ],
)
def test_a_tracker_that_fails_never_stops_training(
    at: str, error: BaseException, lost: int, said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    failing = type("Failing", (Failing,), {"at": at, "error": error, "logged": []})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", failing)
    record = train(tiny.recipe(tmp_path, tracking=["jsonl", "wandb", "tensorboard"]), progress=False)
    assert record["status"] == "finished"
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    err = capsys.readouterr().err
    assert err.count(f"warning: `wandb` {said}") == 2  # once when it happened, once at the end
    assert f"{lost} record" in err
    assert "Traceback" not in err
    assert "free the disk" not in err
    assert record["tracking_failed"]["wandb"]["lost"] == lost
    assert json.loads((tmp_path / "run/run.json").read_text())["tracking_failed"]["wandb"]["lost"] == lost
    assert failing.logged == ([0, 1] if at == "log" else [0, 1, 2, 3, 4, 4] if at == "finish" else [])
    assert list((tmp_path / "run/tracking").rglob("events.*"))  # the other tracker goes on


def test_a_secret_in_what_a_tracker_says_is_masked(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")

    def start() -> Any:
        raise RuntimeError("bad key 0123456789abcdef \x1b[2J")

    Guarded("wandb", start, print)
    out = capsys.readouterr().out
    assert "0123456789abcdef" not in out
    assert "\x1b" not in out


def test_trackers_start_before_an_old_run_is_cleared(tmp_path: Path, monkeypatch: Any) -> None:
    train(tiny.recipe(tmp_path, tracking=["jsonl", "tensorboard"]), progress=False)
    before = {path.name for path in (tmp_path / "run/tracking").rglob("events.*")}
    seen = []

    def start(self: Any, run_name: str) -> None:
        seen.append((tmp_path / "run/adapter/adapter_model.safetensors").is_file())

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", type("Watching", (Failing,), {"__init__": start}))
    train(tiny.recipe(tmp_path, tracking=["jsonl", "tensorboard", "wandb"]), progress=False, overwrite=True)
    assert seen == [True]
    after = {path.name for path in (tmp_path / "run/tracking").rglob("events.*")}
    assert after
    assert not before & after  # the old run's events are gone, those of the new one stay


def test_metrics_on_a_full_disk_do_not_stop_training(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    receive = JsonlSink.receive

    def full(self: JsonlSink, event: Any) -> None:
        if event.step == 2 and isinstance(event, StepEnd):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        receive(self, event)

    monkeypatch.setattr(JsonlSink, "receive", full)
    record = train(tiny.recipe(tmp_path), progress=False)
    assert record["status"] == "finished"
    assert record["tracking_failed"] == {"jsonl": {"lost": 1, "reason": "No space left on device"}}
    assert [event["step"] for event in tiny.events(tmp_path / "run", "step")] == [1, 3, 4]  # it goes on where it can
    assert capsys.readouterr().err.count("No space left") == 2


def test_a_line_that_was_cut_short_is_not_joined_with_the_next(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    file = sink._file

    class Filling:
        room = 20

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "full")
            taken, self.room = data[: self.room], max(0, self.room - len(data))
            return file.write(taken)

        def close(self) -> None:
            file.close()

    sink._file = Filling()
    with pytest.raises(OSError, match="full"):
        sink.receive(STEP)
    sink._file = file
    sink.receive(Saved(2, "step-2"))
    sink.close()
    assert [event["event"] for event in read_events(tmp_path / "metrics.jsonl")] == ["saved"]


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "gone"), ValueError("closed file")])
@pytest.mark.parametrize("live", [True, False])
def test_a_terminal_that_is_gone_stops_nothing(error: Exception, live: bool) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    sink = ProgressSink(Gone(), live=live)
    for event in (RunStart(0, 4), STEP, Saved(1, "step-1")):
        sink.receive(event)
    sink.close()


def test_a_sink_that_is_passed_in_gets_what_metrics_jsonl_gets_and_notes_go_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, told = tiny.Heard(), list[str]()
    loaded = tiny.recipe(tmp_path, data={"eval": None})
    capsys.readouterr()  # what libraries say as they write the tiny model
    train(loaded, sinks=[kept], tell=told.append, progress=False)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [event.as_dict() for event in kept.events if event.logged] == list(map(json.loads, lines))
    assert kept.closed
    again = train(loaded, resume=True, tell=told.append, progress=False)
    assert again["status"] == "finished"
    assert "is already finished" in told[-1]
    assert capsys.readouterr() == ("", "")
