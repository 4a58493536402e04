"""Count what a process does to files under a directory; let it die, or its disk be full, at one of these operations.

Counted are: opening for writing, making, renaming and deleting (by Python's audit events), and ``os.fsync``.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Faults:
    """Watch this process from now on; an audit hook cannot be taken away, so use it in a process of its own.

    Args:
        directory: Only operations on paths in it count.
        at: The operation at which it happens, from 1; 0: never.
        full: Whether the disk is full from that operation on, instead of the process being killed before it.
    """

    def __init__(self, directory: Path, at: int = 0, *, full: bool = False) -> None:
        self.count = 0
        self._prefix, self._at, self._full = str(directory), at, full
        self._fsync = os.fsync
        os.fsync = self._counted_fsync
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & _WRITES
            if writes and isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(self._prefix):
                self._operation(deletes=False)
        elif event in _CHANGES and isinstance(arguments[0], (str, bytes, os.PathLike)):
            # In a directory that is open (shutil.rmtree) the path is relative: it is ours, nothing else is deleted.
            path = os.fsdecode(arguments[0])
            if path.startswith(self._prefix) or not os.path.isabs(path):
                self._operation(deletes=event in ("os.rmdir", "os.remove", "os.rename"))

    def _counted_fsync(self, descriptor: Any) -> None:
        self._operation(deletes=False)
        self._fsync(descriptor)

    def _operation(self, *, deletes: bool) -> None:
        self.count += 1
        if self._full and self._at and self.count >= self._at and not deletes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._prefix)
        if not self._full and self.count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
