"""One writer a run directory, however the writer before ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.errors import RunDirError
from ftune.run.lock import LOCK, RunLock

HOLD = """
import sys, time
from pathlib import Path
from ftune.run.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(root: Path) -> subprocess.Popen[str]:
    """Another process that holds a lock."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    return other


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    other = hold(tmp_path / "run")
    try:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(RunDirError, match=rf"in use by another process: pid {other.pid} on \S+, since") as at:
                train(tiny.recipe(tmp_path), **options)
            assert at.value.exit_code == 2
        with pytest.raises(RunDirError, match="in use"), RunLock(tmp_path / "run", shared=True):
            pass
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        # The kernel let go: what is left of the file locks nothing.
        assert (tmp_path / "run" / LOCK).exists()
        with RunLock(tmp_path / "run"):
            pass
    finally:
        other.kill()
        other.wait()
        assert other.stdout is not None
        other.stdout.close()


def test_readers_share_and_keep_writers_out(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        pass
    with RunLock(tmp_path, shared=True), RunLock(tmp_path, shared=True):
        # not by the name of the writer before, which has ended
        with pytest.raises(RunDirError, match="in use by another process: one that reads it"), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


def test_a_directory_that_holds_only_a_lock_is_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"):
        pass
    (tmp_path / "run/.tmp-run.json").write_text("{")
    RunDir(tmp_path / "run").prepare(overwrite=False, resume=False)


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunLock(tmp_path):
        assert "cannot be locked" in capsys.readouterr().err


def test_a_run_that_another_process_made_before_the_lock_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, enter = tiny.recipe(tmp_path), RunLock.__enter__

    def late(lock: RunLock) -> RunLock:
        (tmp_path / "run/run.json").write_text("{}")
        return enter(lock)

    monkeypatch.setattr(RunLock, "__enter__", late)
    with pytest.raises(RunDirError, match="already holds a run"):
        train(loaded, progress=False)
