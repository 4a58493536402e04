"""What ftune writes never leaves the run directory by a link, and it waits on no pipe."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.artifacts.tuned import reading
from ftune.errors import FtuneError, ModelError, RecipeError, RunDirError
from ftune.recipe import load_checked
from ftune.recipe.locate import locate_model
from ftune.recipe.schema import ModelSpec
from ftune.regular import IrregularError, kind_of, open_regular, read_regular
from ftune.run import files
from ftune.run.lock import LOCK, RunLock

DEAR = "all that I have"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("finished")
    train(tiny.recipe(where, checkpoint={"every_steps": 2}), progress=False)
    return where


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def dear(tmp_path: Path) -> Iterator[Path]:
    """A file of the user's, outside the run; whatever happens, it stays as it is."""
    path = tmp_path / "dear.txt"
    path.write_text(DEAR)
    yield path
    assert path.read_text() == DEAR
    assert not list(path.parent.glob(".tmp*"))


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """Waiting on a pipe is a failure, not a hang of the tests."""

    def late(*_: object) -> None:
        raise AssertionError("waited")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def replace(path: Path, kind: str, dear: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "a link":
        path.symlink_to(dear)
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            os.chdir(path.parent)  # the name of a socket is short
            made.bind(path.name)


INSIDE = [
    "run.json",
    ".lock",
    "metrics.jsonl",
    "eval.json",
    "adapter",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "checkpoints",
    "checkpoints/step-4",
    "checkpoints/step-4/optimizer.pt",
    "merged",
    "lora",
    "tracking",
]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("kind", ["a link", "a pipe", "a socket"])
def test_inside_a_run_they_are_refused_by_name(
    name: str, kind: str, run: Path, finished: Path, dear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    replace(run / name, kind, dear)
    with pytest.raises(RunDirError, match=f"{name} is {kind}"), reading(run):
        pass
    for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with pytest.raises(RunDirError, match=f"{name} is {kind}"):
            RunDir(run).prepare(**options)
    if name == "checkpoints":
        with pytest.raises(RunDirError, match=f"{name} is {kind}"):
            train(tiny.recipe(finished, output_dir=str(run)), progress=False, resume=True)


def test_the_run_directory_itself_may_be_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    with reading(tmp_path / "link") as found:
        assert found.run is not None
    RunDir(tmp_path / "link").prepare(overwrite=True, resume=False)


def test_a_link_of_a_tracker_to_its_own_files_is_none_to_refuse(run: Path, dear: Path) -> None:
    (run / "tracking/a").mkdir(parents=True)
    (run / "tracking/latest").symlink_to("a")
    RunDir(run).require_plain()
    (run / "tracking/out").symlink_to(dear.parent)
    with pytest.raises(RunDirError, match="tracking/out is a link"):
        RunDir(run).require_plain()


@pytest.mark.parametrize("name", [".tmp-eval.json", ".tmp-run.json", ".tmp-merged-1", ".tmp-replaced-merged-12"])
def test_temporary_names_cannot_be_foreseen_and_their_links_are_only_unlinked(name: str, run: Path, dear: Path) -> None:
    (run / name).symlink_to(dear)
    files.write_json(run / "eval.json", {})
    files.write_json(run / "run.json", {})
    with files.new_directory(run / "merged") as out:
        (out / "x").write_text("x")
    RunDir(run).sweep()
    assert not any(path.name.startswith(".tmp-") for path in run.iterdir())


def test_a_link_that_is_replaced_is_not_followed(tmp_path: Path, dear: Path) -> None:
    for name in ("file", "directory"):
        (tmp_path / name).symlink_to(dear if name == "file" else dear.parent)
    files.write_text(tmp_path / "file", "new")
    with files.new_directory(tmp_path / "directory") as out:
        (out / "dear.txt").write_text("new")
    assert kind_of(tmp_path / "file") is None
    assert kind_of(tmp_path / "directory") == "a directory"
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("target", ["link", "dangling"])
def test_what_is_written_elsewhere_goes_through_no_link(target: str, tmp_path: Path, dear: Path) -> None:
    (tmp_path / target).symlink_to(dear if target == "link" else tmp_path / "nowhere")
    with pytest.raises(FtuneError, match="is a link"):
        files.require_writable(tmp_path / target, "merge.json", "merged model")
    assert not (tmp_path / "nowhere").exists()


def test_init_writes_through_no_link(tmp_path: Path, dear: Path) -> None:
    for name in ("lora.yaml", "recipe.schema.json"):
        (tmp_path / name).symlink_to(tmp_path / f"nowhere-{name}")
    command = [sys.executable, "-m", "ftune", "init", "lora"]
    for flags in ([], ["--force"]):
        done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "lora.yaml is a link to" in done.stderr
    done = subprocess.run([*command, "--out", "new.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("nowhere*"))


def test_a_lock_that_is_another_name_of_a_file_leaves_it_as_it_is(tmp_path: Path, dear: Path) -> None:
    (tmp_path / "run").mkdir()
    os.link(dear, tmp_path / "run" / LOCK)
    with RunLock(tmp_path / "run"):
        pass


@pytest.mark.parametrize("kind", ["a pipe", "a socket"])
def test_a_recipe_or_a_model_that_is_none_is_refused_by_name(
    kind: str, tmp_path: Path, dear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    replace(tmp_path / "r.yaml", kind, dear)
    with pytest.raises(RecipeError, match=f"the recipe is {kind}"):
        load_checked(tmp_path / "r.yaml")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    replace(tmp_path / "base/tokenizer.json", kind, dear)
    with pytest.raises(ModelError, match=rf"tokenizer.json` is {kind}"):
        locate_model(ModelSpec(id=str(tmp_path / "base")))
    replace(tmp_path / "m.gguf", kind, dear)
    with pytest.raises(ModelError, match=f"is {kind}"):
        locate_model(ModelSpec(id=str(tmp_path / "m.gguf")))


def test_a_device_is_no_file() -> None:
    for follow in (True, False):
        with pytest.raises(IrregularError, match="a device"):
            open_regular(Path("/dev/zero"), follow=follow)


def test_a_file_larger_than_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b" " * 101)
    with pytest.raises(OSError, match="larger than 100 bytes"):
        read_regular(tmp_path / "run.json", 100)
    assert len(read_regular(tmp_path / "run.json", 101)) == 101


# --- leftovers ---

WRITE = """
import sys, time
from pathlib import Path
from ftune.run.files import new_directory
with new_directory(Path(sys.argv[1])) as out:
    (out / "model.safetensors").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


def aged(*paths: Path) -> None:
    """As if a command of a minute ago had left them."""
    for path in paths:
        os.utime(path, (time.time() - 60,) * 2)


def test_a_leftover_goes_with_the_next_command_and_what_is_being_written_stays(run: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITE, str(run / "merged")], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        with reading(run):
            assert len(list(run.glob(".tmp-merged-*/model.safetensors"))) == 1
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    aged(*run.glob(".tmp-*"))
    with reading(run):
        assert not list(run.glob(".tmp-*"))
    assert not (run / "merged").exists()


def test_what_was_made_just_now_has_no_lock_yet_and_stays(run: Path, dear: Path) -> None:
    new = [run / ".tmp-eval.json-00ff", run / ".tmp-merged-00ff", run / "checkpoints/.tmp-step-1-00ff"]
    new[0].touch()
    for path in new[1:]:
        path.mkdir(parents=True)
    (run / ".tmp-run.json-00ff").symlink_to(dear)
    RunDir(run).sweep()
    assert [path.exists() for path in new] == [True] * 3
    assert not (run / ".tmp-run.json-00ff").is_symlink()
    aged(*new)
    RunDir(run).sweep()
    assert [path.exists() for path in new] == [False] * 3
    assert dear.is_file()


def test_evaluations_of_checkpoints_are_swept_too(run: Path, tmp_path: Path) -> None:
    below = run / "evaluations/step-2"
    below.mkdir(parents=True)
    for name in (".tmp-predictions.jsonl-00ff", ".tmp-eval.json-00ff", "eval.json"):
        (below / name).touch()
    aged(*below.iterdir())
    theirs = tmp_path / "theirs/.tmp-theirs-00ff"
    theirs.parent.mkdir()
    theirs.touch()
    aged(theirs)
    with reading(run):
        assert [path.name for path in below.iterdir()] == ["eval.json"]
    (run / "evaluations/step-3").symlink_to(theirs.parent)
    (run / "evaluations/notes").touch()
    RunDir(run).sweep()
    assert theirs.exists()


def test_beside_a_target_elsewhere_only_its_own_leftovers_go(tmp_path: Path) -> None:
    for name in (".tmp-model-00ff", ".tmp-other-00ff", ".tmp-notes"):
        (tmp_path / name).mkdir()
        aged(tmp_path / name)
    files.require_writable(tmp_path / "model", "merge.json", "merged model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-notes", ".tmp-other-00ff"]


def test_without_locks_only_an_old_leftover_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for name, age in ((".tmp-a-00ff", 60), (".tmp-b-00ff", 100_000)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-a-00ff"]


def test_a_file_that_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.json").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(tmp_path / "run.json", {})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": "old"}


def test_a_record_that_is_no_object_is_damaged(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "[]", "3", '{"a": ', "\xff"):
        (tmp_path / "run.json").write_text(text, encoding="latin-1")
        with pytest.raises(RunDirError, match="is damaged"):
            RunDir(tmp_path).read()
