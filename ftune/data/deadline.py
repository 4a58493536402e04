"""A time limit for Python code of a stranger's, on every platform and in every thread: a chat template is a program.

Jinja's sandbox bounds what a template can reach, not how long its loops run. One thread looks twice a second whether
the time of another is up, and raises an exception in it. What is a single call into C is not cut short.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator

__all__ = ["TooLongError", "within"]

_LOOK_SECONDS = 0.5


class TooLongError(Exception):
    """The time was up."""


_lock = threading.Lock()
_ends: dict[int, float] = {}
"""When the time of a thread is up, by its identifier."""
_watch: threading.Thread | None = None


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise ``TooLongError`` in the block once it has run for ``seconds``, to half a second.

    Args:
        seconds: Of the clock on the wall. Blocks are not nested.
    """
    me = threading.get_ident()
    with _lock:
        _ends[me] = time.monotonic() + seconds
        _start()
    try:
        yield
    except Exception as error:
        # Jinja stumbles over an exception that comes between two lines, and makes another one of it.
        if _ends.get(me) is None:
            raise TooLongError from error
        raise
    finally:
        with _lock:
            if _ends.pop(me, None) is None:  # raised, but perhaps not yet here
                _raise(me, None)


def _start() -> None:
    """Start the thread that looks, where there is none: not yet, or not any more in a process that was forked."""
    global _watch
    if _watch is None or not _watch.is_alive():
        _watch = threading.Thread(target=_look, name="ftune-deadline", daemon=True)
        _watch.start()


def _look() -> None:
    while True:
        time.sleep(_LOOK_SECONDS)
        with _lock:
            now = time.monotonic()
            for thread in [thread for thread, end in _ends.items() if end < now]:
                del _ends[thread]
                _raise(thread, TooLongError)


def _raise(thread: int, error: type[Exception] | None) -> None:
    """Have an exception raised in a thread at its next instruction; None: take back one that was not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(error) if error is not None else None
    )
