"""Open files that are files: links, pipes, sockets and devices are named, not followed or waited for.

A directory from a stranger may hold a link to any file of the user's, or a pipe on which a reader waits forever. On
the standard library alone, below every layer.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["IrregularError", "kind_of", "new_file", "open_regular", "read_regular", "token", "walk_irregular"]

_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# so that opening a pipe does not wait for who writes into it
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a directory"),
    (lambda mode: stat.S_ISBLK(mode) or stat.S_ISCHR(mode), "a device"),
)


class IrregularError(OSError):
    """What stands at a path is no file to read or write.

    Attributes:
        kind: What it is: ``a link``, ``a pipe``, ``a socket``, ``a device``, ``a directory``.
    """

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(errno.EINVAL, f"{path} is {kind}, not a file")
        self.kind = kind

    def __str__(self) -> str:
        """Without the number, which says nothing here."""
        return str(self.strerror)


def kind_of(path: Path, *, follow: bool = False) -> str | None:
    """What stands at a path that is no regular file; None for a regular file, and for nothing at all.

    Args:
        path: Where to look.
        follow: Whether a link stands for what it leads to.
    """
    try:
        mode = (path.stat() if follow else path.lstat()).st_mode
    except OSError:
        return None
    return _kind(mode)


def _kind(mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return None
    return next((name for test, name in _KINDS if test(mode)), "no file")


def open_regular(path: Path, *, follow: bool = False, flags: int = os.O_RDONLY) -> int:
    """Open a regular file; returns the descriptor.

    Args:
        path: The file.
        follow: Whether a link is followed.
        flags: As ``os.open`` takes them; new files are readable by all, less the process's mask.

    Raises:
        IrregularError: It is something else; nothing was read from it, and nobody waited.
        OSError: It cannot be opened.
    """
    # Looked at first: opening a device may do something by itself.
    if kind := kind_of(path, follow=follow):
        raise IrregularError(path, kind)
    try:
        descriptor = os.open(path, flags | _FLAGS | _NO_WAIT | (0 if follow else _NO_LINK), 0o666)
    except OSError as error:
        if kind := kind_of(path, follow=follow):  # put there in between
            raise IrregularError(path, kind) from error
        raise
    if kind := _kind(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IrregularError(path, kind)
    return descriptor


def read_regular(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        IrregularError: It is no file.
        OSError: It cannot be read, or is larger (``errno.EFBIG``).
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return data


def new_file(path: Path) -> BinaryIO:
    """Make a file that was not there, and open it for writing; a link that stands there is not followed.

    Raises:
        FileExistsError: Something is there.
        OSError: It cannot be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _FLAGS
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def token() -> str:
    """A part of a temporary name that nobody can foresee."""
    return secrets.token_hex(8)


def walk_irregular(path: Path) -> Iterator[tuple[Path, str]]:
    """What is below a path, itself included, and neither a regular file nor a directory; no link is followed."""
    waiting = [path]
    while waiting:
        here = waiting.pop()
        kind = kind_of(here)
        if kind == "a directory":
            with os.scandir(here) as entries:
                waiting += sorted((Path(entry.path) for entry in entries), reverse=True)
        elif kind is not None:
            yield here, kind
