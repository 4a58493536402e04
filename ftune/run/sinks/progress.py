"""Progress for people: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from typing import TextIO

from ftune.human import bytes_text, time_text
from ftune.run.events import EvalEnd, Event, Halved, Resumed, RunStart, Saved, StepEnd, Working

__all__ = ["ProgressSink"]

PLAIN_SECONDS = 10.0  # between plain lines, so that a log stays readable
LIVE_SECONDS = 0.1  # between two drawings of the bar
NARROWEST_BAR = 8  # columns; where less is left, figures are left out


class ProgressSink:
    """Write progress to a stream.

    Args:
        stream: Usually standard error.
        live: Whether the stream is a terminal, so that a bar may be drawn. Colours follow ``NO_COLOR``; a terminal
            that calls itself ``dumb`` gets plain lines.
    """

    def __init__(self, stream: TextIO, *, live: bool) -> None:
        self._stream = stream
        self._bar = _Bar(stream) if live and os.environ.get("TERM") != "dumb" else None
        self._total = 0
        self._start = 0
        self._began = time.monotonic()
        self._printed = 0.0
        self._updates = 0
        self._told = False

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
        elif isinstance(event, EvalEnd):
            when = f"step {event.step}" if event.step else "before training"
            if not self._updates:
                self._began = time.monotonic()  # the time left is estimated from updates
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
        """End the live bar, which stays as it was drawn last."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()

    def _step(self, event: StepEnd) -> None:
        done = event.step - self._start
        left = (time.monotonic() - self._began) / done * (self._total - event.step)
        loss, rate = f"loss {event.loss:.4f}", f"lr {event.learning_rate:.2e}"
        speed, peak = f"{event.tokens_per_second:,.0f} tok/s", f"peak {bytes_text(event.peak_bytes)}"
        step, eta = f"step {event.step}/{self._total}", f"ETA {time_text(left)}"
        last = event.step == self._total
        if self._bar is not None:
            self._bar.draw(event.step / self._total, [step, loss, eta, speed, peak, rate], now=last)
            return
        now = time.monotonic()
        if done == 1 or last or now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            self._line("  ".join([step, loss, rate, speed, eta, peak]))

    def _working(self, event: Working) -> None:
        """Say that the first update goes on: live as it does, elsewhere once, where it is long."""
        spent = time.monotonic() - self._began
        if event.what != "update":
            if self._bar is not None:
                self._bar.draw(
                    event.step / self._total, [f"step {event.step}/{self._total}", f"measuring the {event.what}"]
                )
            return
        parts = [
            f"step {event.step + 1}/{self._total}",
            f"{event.done} of {event.of} micro-batch{'es' * (event.of != 1)}",
            time_text(spent),
        ]
        if self._bar is not None:
            self._bar.draw(event.step / self._total, parts)
        elif spent >= PLAIN_SECONDS and not self._told:
            self._told = True
            self._line("  ".join(parts))

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.line(text)
            return
        self._stream.write(text + "\n")
        self._stream.flush()


class _Bar:
    """A bar with figures on the last line of a terminal; other lines appear above it.

    Args:
        stream: The terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        class Terminal(Console):
            def on_broken_pipe(self) -> None:  # rich would end the process, and with it the training
                self.quiet = True

        self._console = Terminal(file=stream, force_terminal=True, highlight=False)
        # No thread of its own: it draws when something is known.
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._drawn = -LIVE_SECONDS

    def draw(self, share: float, parts: Sequence[str], *, now: bool = True) -> None:
        """Draw it over.

        Args:
            share: What is done, of 1.
            parts: The first stands before the bar, the others behind; the last are left out where it is too narrow.
            now: False: not if it was drawn a moment ago; then the next drawing shows it, or ``close``.
        """
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        first, *others = parts
        while others and len("  ".join([first, *others])) + NARROWEST_BAR + 2 > self._console.width and len(others) > 1:
            others.pop()
        line = Table.grid(padding=(0, 2, 0, 0), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        line.add_row(first, ProgressBar(total=1.0, completed=share), "  ".join(others))
        if not self._live.is_started:
            self._live.start()
            self._console.show_cursor(True)  # a process that is killed cannot bring it back
        due = now or time.monotonic() - self._drawn >= LIVE_SECONDS
        if due:
            self._drawn = time.monotonic()
        self._live.update(line, refresh=due)

    def line(self, text: str) -> None:
        """Write a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._live.stop()
