"""What stops a command: Ctrl-C (SIGINT), SIGTERM, and SIGHUP, which comes when the terminal is closed.

A command that only computes ends at once, by the way of an exception, so that it leaves nothing half written. Training
finishes the update it is at, and saves; asked a second time, it ends at once too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

__all__ = ["SIGNALS", "Interruptible", "StopRequest"]

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_IMPATIENT_SECONDS = 2.0
"""Signals that follow within it on one that stops at once are the same wish: what is half written is being deleted."""


class Interruptible:
    """While active, a signal raises ``KeyboardInterrupt``, and one that comes a while later ends the process.

    ``signal_number`` is 0 until one came. Whatever is raised after that is its consequence: libraries make other
    exceptions of it. After a signal the handlers stay, for a third one may come while the interpreter ends.
    """

    _active: Interruptible | None = None

    def __init__(self) -> None:
        self.signal_number = 0
        self.raised = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptible:
        self._before = _install(self._handle)
        Interruptible._active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Interruptible._active = None
        if not self.signal_number:
            _restore(self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            if time.monotonic() - self.raised > _IMPATIENT_SECONDS:
                os._exit(128 + self.signal_number)
            return
        self.signal_number, self.raised = number, time.monotonic()
        raise KeyboardInterrupt


class StopRequest:
    """While active, remembers the first signal; a second one interrupts at once (SIGTERM only two seconds later).

    Outside the main thread, where Python allows no handlers, none is seen.

    Attributes:
        signal_number: 0 until a signal came.
        doing: What is finished first, as the user is told; None while there is nothing worth it: then the first
            signal interrupts at once.
        step: The update that is being made, counted from 1; 0 before the first.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.doing: str | None = None
        self.step = 0
        self._asked: float | None = None
        self._raised: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = _install(self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.signal_number and Interruptible._active is not None:
            Interruptible._active.signal_number = self.signal_number
            Interruptible._active.raised = time.monotonic()
        _restore(self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.doing is None or self.signal_number:
            # a launcher that ends sends its processes what the kernel sends them, too: nobody types SIGTERM
            again = number != signal.SIGINT and self._asked is not None and now - self._asked < _IMPATIENT_SECONDS
            if again or (self._raised is not None and now - self._raised < _IMPATIENT_SECONDS):
                return
            self.signal_number, self._raised = self.signal_number or number, now
            raise KeyboardInterrupt
        self.signal_number, self._asked = number, now
        _tell(f"{signal.Signals(number).name}: finishing {self.doing}; once more stops at once")


def _install(handler: Any) -> dict[int, Any]:
    before: dict[int, Any] = {}
    for number in SIGNALS:
        # nohup, and a shell's background jobs, ask for a signal to be ignored
        if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
            continue
        try:
            before[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread
            break
    return before


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _tell(line: str) -> None:
    """Print a line from within a signal handler; of several processes, the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
    # Not print: the signal may have come in the midst of one, which cannot be entered twice.
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())
