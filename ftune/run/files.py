"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftune.errors import FtuneError

__all__ = [
    "as_os_error",
    "new_directory",
    "remove_leftovers",
    "require_writable",
    "sync",
    "write_json",
    "write_text",
]

_ASIDE = ".tmp-"
_REPLACED = ".tmp-replaced-"


def sync(path: Path) -> None:
    """Force a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step: after a crash it is the old one or the new one, whole."""
    aside = path.with_name(_ASIDE + path.name)
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Turn what safetensors and torch raise when a write fails into the ``OSError`` that it is."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, OSError):
            raise
        if number := re.search(r"os error (\d+)", text):  # safetensors, written in Rust
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        if isinstance(error, RuntimeError) and re.search(
            "PytorchStreamWriter|inline_container|file write failed|iostream", text
        ):
            raise OSError(errno.EIO, f"torch could not write: {text.splitlines()[0]}") from error
        raise


def require_writable(target: Path, marker: str, what: str) -> None:
    """Hold that ``new_directory`` can and may make ``target``, before the work that fills it.

    Args:
        target: A directory to be made, or replaced where it holds an older one of its kind.
        marker: The file by which that kind is known.
        what: The kind, for the message.

    Raises:
        FtuneError: It cannot be written, or holds something else.
    """
    if target.exists() and not (target / marker).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise FtuneError(f"{target} exists and is no {what}", help="choose another --out")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=_ASIDE):
            pass
    except OSError as error:
        raise FtuneError(f"cannot write to {target}: {error}", help="choose another --out") from error


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Give a directory to write into, which becomes ``target`` when the block ends well.

    Everything in it reaches the disk before the rename. An older ``target`` is replaced. When the block raises,
    nothing is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{_ASIDE}{target.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            sync(path)
        sync(aside)
        old = None
        if target.exists():
            # A directory cannot be renamed over a full one: the old one steps aside first.
            old = target.with_name(f"{_REPLACED}{target.name}-{os.getpid()}")
            os.replace(target, old)
        try:
            os.replace(aside, target)
        except BaseException:
            if old is not None:
                os.replace(old, target)
            raise
        sync(target.parent)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed process left half written in ``directory``; put back what it was about to replace."""
    if not directory.is_dir():
        return
    for path in list(directory.iterdir()):
        replaced = re.fullmatch(re.escape(_REPLACED) + r"(.+)-\d+", path.name)
        if replaced and not path.with_name(replaced[1]).exists():
            os.replace(path, path.with_name(replaced[1]))
        elif path.name.startswith(_ASIDE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
