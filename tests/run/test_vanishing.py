"""A directory that vanishes or cannot be written any more: the reason it really had, and nothing half written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors import SafetensorError

from ftune.artifacts import merge as merge_module
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.errors import RunFailed
from ftune.run import checkpoint
from ftune.run.files import failed
from ftune.run.loop import Loop


@pytest.mark.parametrize("at", [2, 4])
def test_a_run_that_is_deleted_while_it_trains(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Loop.save

    def deleted(self: Loop, step: int) -> None:
        save(self, step)
        if step == at:
            shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(Loop, "save", deleted)
    with pytest.raises(RunFailed, match="is not there any more") as at_fault:
        train(tiny.recipe(tmp_path, checkpoint={"every_steps": 1}), progress=False)
    assert "free the disk" not in (at_fault.value.help or "")
    assert not (tmp_path / "run").exists()  # not half of one, without its run.json


@pytest.mark.parametrize(
    ("number", "help"),
    [(errno.EROFS, "takes no more writes"), (errno.EACCES, "right"), (errno.ENOSPC, "free the disk")],
)
def test_a_run_that_cannot_be_written_any_more(
    number: int, help: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "run/checkpoints/x")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(RunFailed, match=os.strerror(number)) as at_fault:
        train(tiny.recipe(tmp_path), progress=False)
    assert help in (at_fault.value.help or "")
    assert "--resume" in (at_fault.value.help or "")
    assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_what_safetensors_says_of_a_full_disk_is_told_of_any_command(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path), progress=False)
    with pytest.raises(RunFailed, match="No space left on device") as at_fault, RunDir(tmp_path / "run").reading():
        raise SafetensorError(f"Error while serializing: I/O error: No space left (os error {errno.ENOSPC})")
    assert at_fault.value.help == "free the disk"


@pytest.mark.parametrize("gone", [True, False])
def test_a_merge_whose_directory_vanishes_or_is_full(
    gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny.recipe(tmp_path), progress=False)
    run = RunDir(tmp_path / "run")

    def away(*_: Any) -> Any:
        if gone:
            shutil.rmtree(run.root)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.safetensors")

    monkeypatch.setattr(merge_module, "reload", away)
    with pytest.raises(RunFailed, match="is not there any more" if gone else "No space left"), run.reading():
        merge(run)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert run.root.exists() is not gone


def test_a_reader_that_has_gone_away_is_no_failure(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path), progress=False)
    with pytest.raises(BrokenPipeError), RunDir(tmp_path / "run").reading():
        raise BrokenPipeError


def test_an_error_without_a_number_keeps_its_words() -> None:
    assert "the merge failed: odd" in failed(OSError("odd"), "the merge").render()
