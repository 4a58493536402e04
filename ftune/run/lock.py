"""One writer a run directory: a lock that the kernel lets go of, however its holder ends.

``flock`` on ``RUN/.lock``. It belongs to the open file, so kill -9, a crash or a reboot release it, and a file that is
left behind locks nothing. On NFS, Linux makes it a lock of the server, which holds between machines; where the file
system knows no locks (some Lustre and FUSE mounts, ``local_lock`` on NFS for other machines) nothing is held, and a
warning says so where that can be seen. Who only reads a run (eval, chat, merge, convert) shares the lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from ftune.errors import RunDirError, RunInUse
from ftune.human import now_text
from ftune.regular import IrregularError, open_regular, read_regular

__all__ = ["LOCK", "RunLock", "is_orphaned"]

LOCK = ".lock"


class RunLock:
    """Hold a run directory while it is written, or keep it from being replaced while it is read.

    Args:
        root: The run directory.
        shared: Whether others may hold it in the same way.

    Raises:
        RunInUse: On entering: another process holds it; the message names it.
        RunDirError: The lock cannot be taken.
    """

    def __init__(self, root: Path, *, shared: bool = False) -> None:
        self._root = root
        self._shared = shared
        self._file: int | None = None

    def __enter__(self) -> Self:
        path = self._root / LOCK
        try:
            self._file = open_regular(path, flags=os.O_RDONLY if self._shared else os.O_RDWR | os.O_CREAT)
        except IrregularError as error:
            raise RunDirError(f"the run's lock cannot be taken: {error}", help=f"delete {path}") from error
        except OSError as error:
            if self._shared:  # nobody ever locked it
                return self
            raise RunDirError(f"cannot write the run: {error}", help="choose another output_dir") from error
        if not self._take():
            holder = _holder(path)
            os.close(self._file)
            self._file = None
            raise RunInUse(
                f"{self._root} is in use by another process: {holder}",
                help="wait for it or stop it; the lock goes with the process, nothing has to be deleted; `--checkpoint "
                "step-N` of eval, predict and chat needs no waiting",
            )
        if not self._shared:
            me = {"pid": os.getpid(), "host": platform.node(), "since": now_text()}
            self._write((json.dumps(me) + "\n").encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            if not self._shared:
                self._write(b"")  # or the next to hold it, a reader, would go by this name
            os.close(self._file)  # the file stays: deleting it would let two hold two files of one name
            self._file = None

    def fileno(self) -> int:
        """The open file, for children that are to hold the lock too; it is free once all of them have ended."""
        assert self._file is not None
        return self._file

    def _write(self, content: bytes) -> None:
        """Replace what the file says of its holder."""
        assert self._file is not None
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its holder's name
            # A file of two names may be another one of the user's: locked, but left as it is.
            if os.fstat(self._file).st_nlink == 1:
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, content, 0)

    def _take(self) -> bool:
        """Take the lock; False where another has it."""
        assert self._file is not None
        try:
            import fcntl
        except ImportError:  # Windows
            print("warning: this system has no flock: nothing keeps a second process out", file=sys.stderr)
            return True
        try:
            fcntl.flock(self._file, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            print(f"warning: {self._root} cannot be locked ({error}): let no second process write it", file=sys.stderr)
        return True


def is_orphaned(root: Path) -> bool:
    """Whether the process that took a directory's lock has ended on this host; its children may hold it still."""
    try:
        holder = json.loads(read_regular(root / LOCK, 10_000))
        if holder["host"] != platform.node():
            return False
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return False


def _holder(path: Path) -> str:
    """Who wrote its name into the lock."""
    try:
        holder = json.loads(read_regular(path, 10_000))
        return f"pid {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "one that reads it (eval, chat, merge or convert), or has just begun"
