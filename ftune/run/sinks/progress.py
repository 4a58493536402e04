"""Progress for people: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import shutil
import time
from typing import TextIO

from ftune.human import bytes_text, time_text
from ftune.run.events import EvalEnd, Event, Forecast, Halved, Resumed, RunStart, Saved, StepEnd, Working

__all__ = ["ProgressSink"]

PLAIN_SECONDS = 10.0  # between plain lines, so that a log stays readable


class ProgressSink:
    """Write progress to a stream.

    Args:
        stream: Usually standard error.
        live: Whether the stream is a terminal, so that a line may be drawn over.
    """

    def __init__(self, stream: TextIO, *, live: bool) -> None:
        self._stream = stream
        self._live = live
        self._total = 0
        self._start = 0
        self._began = time.monotonic()
        self._printed = 0.0
        self._updates = 0
        self._told = False
        self._drawn = False

    def receive(self, event: Event) -> None:
        """Show one event; a reader that has gone away must not stop the training."""
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone, a stream that is closed
            self._show(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, RunStart):
            self._total, self._start, self._began = event.total_steps, event.step, time.monotonic()
        elif isinstance(event, StepEnd):
            self._updates += 1
            self._step(event)
        elif isinstance(event, Working):
            self._working(event)
        elif isinstance(event, Forecast):
            self._line(
                f"step {event.step}: about {time_text(event.seconds)} in all, by the first {event.updates} updates"
            )
        elif isinstance(event, EvalEnd):
            when = f"step {event.step}" if event.step else "before training"
            if not self._updates:
                self._began = time.monotonic()  # what is left is foretold by the time of updates
            self._line(f"{when}: held-out loss {event.loss:.4f}, perplexity {event.perplexity:.3f}")
        elif isinstance(event, Saved):
            self._line(f"step {event.step}: saved {event.path}")
        elif isinstance(event, Halved):
            self._line(
                f"memory ran out in update {event.step + 1}: now in {event.now} micro-batches instead of "
                f"{event.before}, with the same result"
            )
        elif isinstance(event, Resumed):
            self._line(f"resumed after step {event.step} from {event.checkpoint}")

    def close(self) -> None:
        """End the live line."""
        if self._drawn:
            with contextlib.suppress(OSError, ValueError):
                self._stream.write("\n")
                self._stream.flush()
            self._drawn = False

    def _step(self, event: StepEnd) -> None:
        done = event.step - self._start
        left = (time.monotonic() - self._began) / done * (self._total - event.step)
        parts = [
            f"step {event.step}/{self._total}",
            f"loss {event.loss:.4f}",
            f"lr {event.learning_rate:.2e}",
            f"{event.tokens_per_second:,.0f} tok/s",
            f"ETA {time_text(left)}",
            f"peak {bytes_text(event.peak_bytes)}",
        ]
        if self._live:
            self._draw(parts)
            return
        now = time.monotonic()
        if done == 1 or event.step == self._total or now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            self._line("  ".join(parts))

    def _working(self, event: Working) -> None:
        """Say that the first update goes on: live as it does, elsewhere once, where it is long."""
        spent = time.monotonic() - self._began
        if event.what != "update":
            if self._live:
                self._draw([f"step {event.step}/{self._total}", f"measuring the {event.what}"])
            return
        parts = [
            f"step {event.step + 1}/{self._total}",
            f"{event.done} of {event.of} micro-batch{'es' * (event.of != 1)}",
            time_text(spent),
        ]
        if self._live:
            self._draw(parts)
        elif spent >= PLAIN_SECONDS and not self._told:
            self._told = True
            self._line("  ".join(parts))

    def _draw(self, parts: list[str]) -> None:
        """Draw the live line over, without the last parts where it is too narrow."""
        width = shutil.get_terminal_size().columns
        while len("  ".join(parts)) >= width and len(parts) > 2:
            parts = parts[:-1]
        self._stream.write("\r\x1b[2K" + "  ".join(parts)[: width - 1])
        self._stream.flush()
        self._drawn = True

    def _line(self, text: str) -> None:
        self._stream.write(("\r\x1b[2K" if self._drawn else "") + text + "\n")
        self._stream.flush()
        self._drawn = False
