"""Files that a user names for what a command writes."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from ftune.errors import FtuneError
from ftune.regular import kind_of
from ftune.run.files import write_text

__all__ = ["is_standard_output", "is_stream", "require_output", "write_output"]

_STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def is_standard_output(path: Path) -> bool:
    """Whether a name stands for standard output, wherever that leads."""
    return str(path) in _STANDARD_OUTPUT


def is_stream(path: Path) -> bool:
    """Whether it is a pipe or a terminal, ``/dev/null`` or the like, by its name or by a link: written to as it is."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def require_output(path: Path, option: str, inputs: Sequence[tuple[Path, str]] = ()) -> None:
    """Hold that ``write_output`` may write a file, before the work whose result it takes.

    Args:
        path: The file, or a stream.
        option: Which option names it, for the message.
        inputs: What must not be replaced, and what each is.

    Raises:
        FtuneError: It is a directory, a link to a file or to nothing, a disk or a socket, is one of the inputs, may not
            be written, or is in a directory that is not there.
    """
    help = f"{option} names a file in a directory that exists"
    if is_stream(path):
        return
    kind = kind_of(path)
    if kind == "a link":
        raise FtuneError(f"{path} is a link to {os.readlink(path)}", help=f"name with {option} the file that is meant")
    if kind is not None:
        raise FtuneError(f"cannot write to {path}: it is {kind}", help=help)
    if not path.parent.is_dir():
        raise FtuneError(f"cannot write to {path}: there is no directory {path.parent}", help=help)
    if not path.exists():
        return
    for file, what in inputs:
        if file.exists() and path.samefile(file):
            raise FtuneError(f"{path} is {what}, and would be replaced", help=f"name another file with {option}")
    if not os.access(path, os.W_OK):
        raise FtuneError(f"cannot write to {path}: it may only be read", help=f"name another file with {option}")


def write_output(path: Path, text: str, option: str) -> None:
    """Replace a text file in one step, or write into a stream.

    Args:
        path: The file, or a stream.
        text: What is written.
        option: Which option names it, for the message.

    Raises:
        FtuneError: It has become what ``require_output`` refuses.
        OSError: It cannot be written; nobody reads a pipe.
    """
    if is_stream(path):
        _write_stream(path, text.encode("utf-8"))
        return
    require_output(path, option)
    write_text(path, text)


def _write_stream(path: Path, content: bytes) -> None:
    """Write into what is there; a pipe that nobody reads is an error at once."""
    flags = os.O_WRONLY | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    waiting = getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | waiting)
    with os.fdopen(descriptor, "wb") as file:
        if waiting:
            os.set_blocking(descriptor, True)  # a reader may be slow
        file.write(content)
