"""Files that a user names for a result: what is not a file is not replaced by one, and no input is."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ftune.cli import app
from ftune.errors import FtuneError
from ftune.run.files import write_text
from ftune.run.outputs import is_standard_output, is_stream, require_output, write_output


def test_a_file_is_replaced_and_keeps_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "x"
    require_output(path, "--out")
    write_output(path, "one", "--out")
    usual = stat.S_IMODE(path.stat().st_mode)
    for mode in (0o600, 0o640, 0o444, usual):
        path.chmod(mode)
        write_text(path, "two")
        assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", mode)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("kind", ["a link", "a link to nothing", "a link to itself", "a directory", "a socket"])
def test_what_is_no_file_is_refused_by_name(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, real = Path("x"), Path("real")
    real.write_text("mine")
    if kind == "a directory":
        path.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("x")
    else:
        path.symlink_to({"a link": "real", "a link to itself": "x"}.get(kind, "nowhere"))
    before = os.lstat(path)
    for attempt in (lambda: require_output(path, "--out"), lambda: write_output(path, "text", "--out")):
        with pytest.raises(FtuneError, match=rf"\bx\b.* is {kind.split(' to ')[0]}") as caught:
            attempt()
        assert "--out" in (caught.value.help or "")
    assert os.lstat(path) == before
    assert real.read_text() == "mine"
    assert not Path("nowhere").exists()


def test_an_input_is_not_replaced_by_whatever_name(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_text("rows")
    os.link(file, tmp_path / "other")
    for name in ("rows", f"../{tmp_path.name}/rows", "other"):
        with pytest.raises(FtuneError, match="is the data, and would be replaced"):
            require_output(tmp_path / name, "--out", [(file, "the data"), (tmp_path / "gone", "gone")])
    require_output(tmp_path / "new", "--out", [(file, "the data")])


def test_streams_are_written_to(tmp_path: Path) -> None:
    null = tmp_path / "null"
    null.symlink_to(os.devnull)
    for path in (Path(os.devnull), null):
        require_output(path, "--out")
        write_output(path, "text", "--out")
    assert null.is_symlink()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    require_output(pipe, "--out")
    with pytest.raises(OSError, match="No such device"):  # nobody reads it: no waiting
        write_output(pipe, "text", "--out")
    text, read = "x" * 1_000_000, ""  # more than a pipe holds
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)) as opened:
        os.set_blocking(opened.fileno(), True)
        writer = threading.Thread(target=lambda: write_output(pipe, text, "--out"))
        writer.start()
        while len(read) < len(text):
            read += opened.read(100_000)
        writer.join(10)
    assert read == text
    assert is_stream(pipe)
    assert is_standard_output(Path("-"))
    assert not is_standard_output(pipe)


def test_init_replaces_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("real.yaml").write_text("mine")
    Path("link.yaml").symlink_to("real.yaml")
    Path("rows.jsonl").write_text("{}")
    for out, words in (("link.yaml", "is a link to real.yaml"), ("rows.jsonl", "is the training data")):
        done = CliRunner().invoke(app, ["init", "--data", "rows.jsonl", "--out", out, "--force"])
        assert words in str(done.exception)
    assert CliRunner().invoke(app, ["init", "--out", os.devnull]).output == ""
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert sorted(os.listdir()) == ["link.yaml", "real.yaml", "rows.jsonl"]
    Path("real.yaml").chmod(0o600)
    assert CliRunner().invoke(app, ["init", "--out", "real.yaml", "--force"]).exit_code == 0
    assert stat.S_IMODE(Path("real.yaml").stat().st_mode) == 0o600
    assert "method" in CliRunner().invoke(app, ["init", "--out", "/dev/stdout"]).output
