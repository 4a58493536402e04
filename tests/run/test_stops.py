"""What stops a run costs nothing: a checkpoint of the last good state, a whole run.json, a way to go on."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from run.test_loop import assert_equal, losses, stop_after, train_until, weights

from ftune.artifacts import training
from ftune.artifacts.training import train
from ftune.errors import FtuneError, Interrupted, RunDirError, RunFailed
from ftune.run.checkpoint import Checkpoints
from ftune.run.objective import Objective
from ftune.run.sinks.jsonl import JsonlSink


def spoil(monkeypatch: pytest.MonkeyPatch, factor: float, after: int) -> None:
    """Multiply the loss of every training batch after the first ``after`` ones."""
    forward, count = Objective.forward, 0

    def spoiled(self: Objective, batch: Any) -> Any:
        nonlocal count
        count += self.training
        return forward(self, batch) * (factor if self.training and count > after else 1.0)

    monkeypatch.setattr(Objective, "forward", spoiled)


@pytest.mark.parametrize(("factor", "bound", "said"), [
    (float("nan"), None, "the gradient norm is nan"),
    (1e6, 1e4, "training.stop_at_grad_norm is 10000"),
])  # fmt: skip
def test_a_bad_update_is_not_made_and_the_state_before_it_is_saved(
    factor: float, bound: float | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"training": {"stop_at_grad_norm": bound}, "data": {"packing": False}}
    train(
        tiny.recipe(tmp_path, output_dir=str(tmp_path / "whole"), checkpoint={"every_steps": 1, "keep": 9}, **changes)
    )
    loaded = tiny.recipe(tmp_path, **changes)
    with monkeypatch.context() as patched:
        # Rows may be laid together: how many batches an update has is counted, not assumed.
        spoil(patched, factor, after=2)
        with pytest.raises(RunFailed, match=r"at step [23], rows \[\d+, \d+\]") as failed:
            train(loaded)
    assert said in str(failed.value)
    saved = sorted((tmp_path / "run/checkpoints").iterdir())
    assert len(saved) == 1
    step = int(saved[0].name.removeprefix("step-"))
    assert f"step-{step} has the state before it" in (failed.value.help or "")
    assert_equal(weights(tmp_path / "run", step), weights(tmp_path / "whole", step))
    train(loaded, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_changed_data_is_accepted_when_told_and_recorded(tmp_path: Path) -> None:
    # By epochs: more rows would be more steps, and another schedule.
    loaded = tiny.recipe(tmp_path, training={"max_steps": None, "epochs": 1}, data={"packing": False})
    train_until(loaded, 2)
    tiny.write_chats(tmp_path / "train.jsonl", 30, start=1)
    with pytest.raises(RunDirError, match="data files") as refused:
        train(loaded, resume=True)
    assert "--accept-changed-data" in (refused.value.help or "")
    record = train(loaded, resume=True, accept_changed_data=True)
    assert record["measured"]["steps"] == 12
    (change,) = json.loads((tmp_path / "run/run.json").read_text())["data_changed"]
    assert change["after_step"] == 2
    assert change["fingerprint"][0] != change["fingerprint"][1]


def test_data_that_did_not_change_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Interrupted):
            train(tiny.recipe(tmp_path))
    assert "data_changed" not in train(tiny.recipe(tmp_path), resume=True, accept_changed_data=True)


def test_a_full_disk_is_one_sentence_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny.recipe(tmp_path, checkpoint={"every_steps": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save = Checkpoints.save

    def fills(self: Checkpoints, step: int, *rest: Any) -> Path:
        if step == 3:  # from here on nothing can be written, not even the end of the run
            monkeypatch.setattr(JsonlSink, "receive", full)
            monkeypatch.setattr(training.RunDir, "write", full)
            full()
        return save(self, step, *rest)

    with monkeypatch.context():
        monkeypatch.setattr(Checkpoints, "save", fills)
        with pytest.raises(RunFailed, match="No space left") as failed:
            train(loaded)
        monkeypatch.undo()
    assert failed.value.exit_code == 1
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "running"
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-1", "step-2"]
    train(loaded, resume=True)
    assert len(losses(tmp_path / "run")) == 4


def test_a_disk_that_is_full_for_the_last_record_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, write = tiny.recipe(tmp_path), training.RunDir.write

    def fills(self: training.RunDir, record: dict[str, Any]) -> None:
        if record["status"] == "finished":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(training.RunDir, "write", fills)
        with pytest.raises(RunFailed, match="writing the run failed: .*No space left"):
            train(loaded)
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "running"
    assert train(loaded, resume=True)["status"] == "finished"
    assert len(losses(tmp_path / "run")) == 4


@pytest.mark.skipif(os.name != "posix", reason="a limit on a file's size is POSIX's")
def test_a_write_that_is_cut_short_in_a_library_is_an_os_error(tmp_path: Path) -> None:
    import resource

    import torch
    from safetensors.torch import save_file

    from ftune.run.files import as_os_error

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (
        lambda: save_file({"a": torch.zeros(4000)}, tmp_path / "a"),
        lambda: torch.save(torch.zeros(4000), tmp_path / "b"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            with pytest.raises(OSError), as_os_error():  # noqa: PT011
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny.recipe(tmp_path, checkpoint={"every_steps": 2}, evaluation={"every_steps": 2})
    train(tiny.recipe(tmp_path, output_dir=str(tmp_path / "whole"), evaluation={"every_steps": 2}))

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.Loop, "evaluate", dies)
        with pytest.raises(Interrupted):
            train(loaded)
    train(loaded, resume=True)
    runs = [[(e["step"], e["loss"]) for e in tiny.events(tmp_path / run, "eval")] for run in ("whole", "run")]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    MemoryError(),
])  # fmt: skip
def test_out_of_memory_says_what_would_fit(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise error

    loaded = tiny.recipe(tmp_path, training={"gradient_checkpointing": False, "micro_batch_size": 2})
    monkeypatch.setattr(Objective, "forward", full)
    with pytest.raises(RunFailed, match=r"memory ran out after 0 of \d+ updates: the plan needs") as failed:
        train(loaded)
    assert failed.value.exit_code == 1
    assert failed.value.__cause__ is error
    assert "change one of these" in (failed.value.help or "")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "failed"
    assert record["error"].startswith("memory ran out")


def test_another_failure_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    loaded = tiny.recipe(tmp_path)
    monkeypatch.setattr(Objective, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(loaded)


def test_a_run_leaves_the_launch_configuration_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    require = training.require_several

    def look(choice: Any, processes: int) -> None:
        seen.append(os.environ.get("ACCELERATE_USE_FSDP"))
        require(choice, processes)

    monkeypatch.setattr(training, "require_several", look)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(FtuneError, match="fsdp2 in one process"):
        train(tiny.recipe(tmp_path))
    assert seen == [None]
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_a_bad_update_right_after_a_checkpoint_leaves_that_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny.recipe(tmp_path, checkpoint={"every_steps": 1, "keep": 1}, data={"packing": False})
    saved: list[int] = []
    save = Checkpoints.save

    def note(self: Checkpoints, step: int, *rest: Any) -> Path:
        saved.append(step)
        return save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", note)
    spoil(monkeypatch, float("nan"), after=2)
    with pytest.raises(RunFailed, match="the gradient norm is nan") as failed:
        train(loaded)
    assert saved == sorted(set(saved))
    assert f"step-{saved[-1]} has the state before it" in (failed.value.help or "")


def test_resuming_a_finished_run_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = tiny.recipe(tmp_path, training={"max_steps": 1})
    record = train(loaded)
    before = (tmp_path / "run/run.json").read_bytes()
    assert train(loaded, resume=True)["measured"] == record["measured"]
    assert "is already finished; --overwrite trains it again" in capsys.readouterr().err
    assert (tmp_path / "run/run.json").read_bytes() == before
