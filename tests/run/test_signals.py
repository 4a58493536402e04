"""Ctrl-C and SIGTERM: one finishes the step and saves, a second stops at once, and both say what is kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftune import cli
from ftune.artifacts import training
from ftune.artifacts.training import train
from ftune.errors import Interrupted
from ftune.run.loop import Loop
from ftune.run.objective import Objective
from ftune.run.signals import SIGNALS, Interruptible, StopRequest


def on_batch(monkeypatch: pytest.MonkeyPatch, signals: dict[int, list[int]], *, training: bool = True) -> None:
    """Send signals to this process in the n-th batch, counted from 1."""
    forward, count = Objective.forward, 0

    def sending(self: Objective, batch: Any) -> Any:
        nonlocal count
        count += self.training == training
        if self.training == training:
            for number in signals.pop(count, []):
                os.kill(os.getpid(), number)
        return forward(self, batch)

    monkeypatch.setattr(Objective, "forward", sending)


def recipe(where: Path, **changes: Any) -> Any:
    # one batch is one update
    changes.setdefault("training", {"gradient_accumulation_steps": 1})
    return tiny.recipe(where, checkpoint={"every_steps": 1}, data={"packing": False, "eval": None}, **changes)


def test_sigterm_of_a_launcher_and_of_the_kernel_is_one_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_batch(monkeypatch, {2: [signal.SIGTERM, signal.SIGTERM]})
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        train(recipe(tmp_path), progress=False)
    assert (tmp_path / "run/checkpoints/step-2").is_dir()


def test_a_connection_lost_by_a_signal_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes the one that ends first takes the others' connections with it."""

    def lost(loop: Loop, *_: Any, **__: Any) -> None:
        loop.stop.doing = "this step"
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Loop, "run", lost)
    with pytest.raises(RuntimeError, match="Connection closed"):
        train(recipe(tmp_path), progress=False)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["status"], "error" in record) == ("interrupted", False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_finishes_the_step_and_saves(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    on_batch(monkeypatch, {2: [number]})
    with pytest.raises(Interrupted, match="stopped after step 2 of 4") as stopped:
        train(recipe(tmp_path), progress=False)
    assert stopped.value.exit_code == 128 + number
    assert f"{number.name}: finishing this step, then saving; once more stops at once" in capfd.readouterr().err
    assert (tmp_path / "run/checkpoints/step-2").is_dir()
    monkeypatch.undo()
    assert train(recipe(tmp_path), resume=True, progress=False)["status"] == "finished"


def test_the_second_says_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_batch(monkeypatch, {3: [signal.SIGINT] * 5})
    with pytest.raises(Interrupted, match="stopped at once in step 3 of 4; kept: the checkpoint after step 2") as at:
        train(recipe(tmp_path), progress=False)
    assert "--resume" in (at.value.help or "")
    assert at.value.exit_code == 130
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "interrupted"
    assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_the_second_in_the_first_step_says_that_nothing_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_batch(monkeypatch, {1: [signal.SIGTERM, signal.SIGINT]})
    with pytest.raises(Interrupted, match="in step 1 of 4; there is no checkpoint yet") as stopped:
        train(recipe(tmp_path), progress=False)
    assert stopped.value.exit_code == 143


def test_in_an_evaluation_it_saves_what_was_not_saved_yet(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    loaded = tiny.recipe(tmp_path, evaluation={"every_steps": 2})
    evaluate = Loop.evaluate

    def interrupted(self: Loop, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        evaluate(self, step)

    monkeypatch.setattr(Loop, "evaluate", interrupted)
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        train(loaded, progress=False)
    assert "finishing this evaluation, then saving" in capfd.readouterr().err
    assert (tmp_path / "run/checkpoints/step-2").is_dir()


def test_in_the_last_evaluation_it_is_too_late_to_stop(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    evaluate = Loop.evaluate

    def interrupted(self: Loop, step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        evaluate(self, step)

    monkeypatch.setattr(Loop, "evaluate", interrupted)
    assert train(tiny.recipe(tmp_path), progress=False)["status"] == "finished"
    assert "saving the result" in capfd.readouterr().err


def test_before_the_first_step_one_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = training.build

    def interrupted(plan: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return build(plan)

    monkeypatch.setattr(training, "build", interrupted)
    with pytest.raises(Interrupted, match="stopped before training began"):
        train(recipe(tmp_path), progress=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopRequest() as stop, Interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal_number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def _handlers() -> Iterator[None]:
    """After an interruption the command line keeps its handlers, for its process is about to end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("finished")
    loaded = tiny.recipe(where)
    train(loaded, progress=False)
    (where / "recipe.yaml").write_text(loaded.text)
    return where


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(
    ("place", "command", "number", "becomes"),
    [
        ("ftune.plan.resolve.load_splits", "plan", signal.SIGINT, None),
        ("ftune.plan.resolve.load_splits", "train", signal.SIGTERM, None),
        ("ftune.plan.base_model.load_config", "plan", signal.SIGTERM, ImportError("numpy was interrupted")),
        ("ftune.artifacts.evaluate.load_plain", "eval", signal.SIGINT, None),
        ("ftune.artifacts.evaluate.load_plain", "eval", signal.SIGTERM, OSError("interrupted")),
        ("ftune.artifacts.merge.reload", "merge", signal.SIGINT, None),
        ("ftune.artifacts.merge.reload", "merge", signal.SIGHUP, None),
        ("ftune.artifacts.chat.load_base", "chat", signal.SIGINT, None),
    ],
)
def test_other_commands_end_with_a_line_and_leave_nothing(
    place: str,
    command: str,
    number: int,
    becomes: Exception | None,
    finished: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    def stop(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            if becomes is None:
                raise
            raise becomes from None
        raise AssertionError("no signal came")

    shutil.copytree(finished / "run", tmp_path / "run")
    text = (finished / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.replace(str(finished / "run"), str(tmp_path / "new")))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(place, stop)
    target = tmp_path / ("recipe.yaml" if command in ("plan", "train") else "run")
    monkeypatch.setattr(sys, "argv", ["ftune", command, str(target)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 128 + number
    err = capsys.readouterr().err
    assert "interrupted" in err
    assert "Traceback" not in err
    made = set(tmp_path.rglob("*")) - set(before)
    assert made <= {tmp_path / "new", tmp_path / "new/.lock"}
