"""A damaged checkpoint is named, set aside and replaced by the one before; the last good one is never deleted."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from run.test_loop import losses, stop_after, train_until

from ftune.artifacts.resume import _newest
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.errors import Interrupted, RunDirError, RunFailed
from ftune.run import checkpoint, files
from ftune.run.checkpoint import Checkpoints


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def leave_out(path: Path) -> None:
    manifest = json.loads(path.read_text())
    del manifest["sha256"]["progress.json"]
    path.write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda at: flip(at / "trained.safetensors"), "trained.safetensors does not match"),
    "short": (lambda at: os.truncate(at / "optimizer.pt", 100), "optimizer.pt does not match"),
    "file": (lambda at: (at / "method.safetensors").unlink(), "method.safetensors is missing"),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (lambda at: os.truncate(at / "manifest.json", 30), "manifest.json cannot be read"),
    "flipped manifest": (lambda at: flip(at / "manifest.json"), ""),
    "list": (lambda at: (at / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "unnamed": (lambda at: leave_out(at / "manifest.json"), "does not name progress.json"),
    "extra": (lambda at: (at / "stray").write_text("x"), "stray: not in manifest.json"),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps stopped after the third, with checkpoints after each."""
    where = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Interrupted):
            train(tiny.recipe(where, checkpoint={"every_steps": 1, "keep": 3}))
    return where / "run/checkpoints"


@pytest.fixture
def found(interrupted: Path, tmp_path: Path) -> Checkpoints:
    import shutil

    shutil.copytree(interrupted, tmp_path / "checkpoints")
    return Checkpoints(tmp_path / "checkpoints", 2)


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_is_named_and_set_aside(kind: str, found: Checkpoints) -> None:
    damage, said = DAMAGE[kind]
    damage(found.path(3))
    path, notes = found.newest()
    assert path == found.path(2)
    assert len(notes) == 1
    assert said in notes[0]
    assert "step-3.damaged" in notes[0]
    assert found.steps() == [1, 2]
    assert [aside.name for aside in found.set_aside()] == ["step-3.damaged"]


def test_a_reader_deletes_nothing(found: Checkpoints) -> None:
    # Every process reads; two that deleted the same leftovers would fail each other.
    half = found.directory / ".tmp-step-4-x"
    half.mkdir()
    assert Checkpoints(found.directory, 2).newest() == (found.path(3), [])
    assert half.is_dir()
    os.utime(half, (0, 0))
    RunDir(found.directory.parent).sweep()  # by who holds the lock
    assert not half.exists()


def test_all_processes_go_on_from_the_main_ones_checkpoint(found: Checkpoints) -> None:
    def newest(rank: int) -> tuple[Path | None, list[str]]:
        """Of one of two processes, when the main one chose step 3."""
        accelerator = SimpleNamespace(num_processes=2, process_index=rank, is_main_process=not rank, device="cpu")
        accelerator.gather = lambda mine: torch.cat([torch.tensor([3]), mine[:1]])
        return _newest(found, accelerator)  # type: ignore[arg-type]

    assert newest(0) == newest(1) == (found.path(3), [])
    # a host that does not see all of it yet: neither another step there, nor a damaged one for all
    (found.path(3) / "optimizer.pt").unlink()
    with pytest.raises(RunDirError, match=r"process 1 does not see .*step-3 .*optimizer\.pt is missing") as refused:
        newest(1)
    assert refused.value.help is not None
    assert found.steps() == [1, 2, 3]
    shutil.rmtree(found.path(3))
    with pytest.raises(RunDirError, match="process 1 does not see"):
        newest(1)


def test_a_whole_checkpoint_is_left_alone(found: Checkpoints) -> None:
    assert found.newest() == (found.path(3), [])
    assert found.set_aside() == []


def test_a_directory_that_is_named_almost_like_one_is_none(found: Checkpoints) -> None:
    for name in ("step-010", "step-abc", "step--1"):
        (found.directory / name).mkdir()
    assert found.steps() == [1, 2, 3]


def test_what_is_set_aside_never_replaces_what_was(found: Checkpoints) -> None:
    (found.directory / "step-3.damaged").mkdir()
    flip(found.path(3) / "trained.safetensors")
    found.newest()
    assert [aside.name for aside in found.set_aside()] == ["step-3.damaged", "step-3.damaged-2"]


def test_a_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, checkpoint={"every_steps": 1, "keep": 2})
    train_until(loaded, 3)
    flip(tmp_path / "run/checkpoints/step-3/trained.safetensors")
    train(loaded, resume=True)
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-3", "step-3.damaged", "step-4"], "the damaged one is not counted in `keep`"


def test_all_damaged_is_refused_again_and_again(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, checkpoint={"every_steps": 1})
    train_until(loaded, 2)
    for step in (1, 2):
        flip(tmp_path / f"run/checkpoints/step-{step}/optimizer.pt")
    for _ in range(2):  # at the second start nothing is called step-N any more
        with pytest.raises(RunDirError, match=r"every checkpoint .* is damaged: step-1.damaged, step-2.damaged"):
            train(loaded, resume=True)
    assert len(losses(tmp_path / "run")) == 2, "what was measured stays"
    assert train(loaded, overwrite=True)["status"] == "finished"


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, checkpoint={"every_steps": 1})
    train_until(loaded, 2)
    shutil.rmtree(tmp_path / "run/checkpoints")
    for _ in range(2):  # the first refusal leaves what the second needs
        with pytest.raises(RunDirError, match="holds no checkpoint, but the run saved step-2") as refused:
            train(loaded, resume=True)
        assert refused.value.help == "put the checkpoints back, or train anew with --overwrite"
    assert len(losses(tmp_path / "run")) == 2, "what was measured stays"
    assert train(loaded, overwrite=True)["status"] == "finished"


def test_a_run_that_never_saved_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny.recipe(tmp_path))
    record = tmp_path / "run/run.json"
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "running"'))
    metrics = tmp_path / "run/metrics.jsonl"
    steps = [line for line in metrics.read_text().splitlines(True) if '"event": "step"' in line]
    metrics.write_text("".join(steps[:2]))
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert train(tiny.recipe(tmp_path), resume=True)["status"] == "finished"
    assert "no checkpoint to resume from: starting at step 0" in capsys.readouterr().err


def test_the_last_good_one_stays_when_the_new_one_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = checkpoint.new_directory, 0

    def failing_disk(target: Path) -> object:
        nonlocal count
        count += 1
        return real(target) if count == 1 else rotten(target)

    import contextlib

    @contextlib.contextmanager
    def rotten(target: Path):  # type: ignore[no-untyped-def]
        with real(target) as out:
            yield out
        flip(target / "trained.safetensors")

    monkeypatch.setattr(checkpoint, "new_directory", failing_disk)
    with pytest.raises(RunFailed, match="not on the disk as it was written"):
        train(tiny.recipe(tmp_path, checkpoint={"every_steps": 1, "keep": 1}))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-1", "step-2.damaged"]


def test_files_reach_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: (sync(path), done.append(f"sync {path.name}")))
    monkeypatch.setattr(os, "replace", lambda a, b: (rename(a, b), done.append(f"rename to {Path(b).name}")))
    with files.new_directory(tmp_path / "target") as out:
        (out / "a").write_text("a")
        (out / "b").write_text("b")
    assert done == ["sync a", "sync b", f"sync {out.name}", "rename to target", f"sync {tmp_path.name}"]


def killed_between_renames(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    """Leave what a process leaves that dies when the old one has stepped aside and the new one has not come."""
    rename = os.replace

    def dies(a: Path, b: Path) -> None:
        if b == target:
            raise KeyboardInterrupt  # again when the old one would be put back
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt), files.new_directory(target) as out:
            (out / "a").write_text("new")
    for left in target.parent.glob(".tmp-*"):
        os.utime(left, (0, 0))


def test_what_was_about_to_be_replaced_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "step-4"
    with files.new_directory(target) as out:
        (out / "a").write_text("old")
    killed_between_renames(monkeypatch, target)
    assert not target.exists()
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert (target / "a").read_text() == "old"
    with files.new_directory(target) as out:
        (out / "a").write_text("newest")
    (tmp_path / ".tmp-replaced-step-4-77").mkdir()  # of one that was killed right after
    os.utime(tmp_path / ".tmp-replaced-step-4-77", (0, 0))
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert (target / "a").read_text() == "newest"


def test_where_the_new_one_cannot_come_the_old_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "step-4", os.replace
    with files.new_directory(target) as out:
        (out / "a").write_text("old")

    def fails(a: Path, b: Path) -> None:
        if b == target and "replaced" not in a.name:
            raise OSError(errno.EIO, "failing")
        rename(a, b)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="failing"), files.new_directory(target) as out:
        (out / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert (target / "a").read_text() == "old"
