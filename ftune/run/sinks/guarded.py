"""A sink that may fail: what it loses is counted and told, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftune.errors import FtuneError
from ftune.run.events import Event, Sink
from ftune.scrub import harmless, scrub

__all__ = ["Guarded", "reason_of"]


class Guarded:
    """Hand events to a sink; where it fails, say so once and count what is lost.

    Args:
        name: What the user calls it: an entry of ``tracking``.
        start: Makes the sink.
        tell: Prints a line for the user.
        takes: Events of which kinds it keeps; what is lost is counted in these.
        again: Whether a sink that failed gets the next event: one that failed for want of disk may go on, a service
            that is away would cost its time-out at every step.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Sink],
        tell: Callable[[str], None],
        *,
        takes: type[Event] | tuple[type[Event], ...] = Event,
        again: bool = False,
    ) -> None:
        self.name = name
        self.lost = 0
        self.reason = ""
        self._tell, self._takes, self._again = tell, takes, again
        self._what = ""
        self._sink: Sink | None = None
        self._try(lambda: setattr(self, "_sink", start()), "could not be started")

    def receive(self, event: Event) -> None:
        """Hand one event on, or count it as lost."""
        if not event.logged:
            return
        kept = self._sink is not None and (self._again or not self.reason)
        sink = self._sink
        if kept and sink is not None:
            kept = self._try(lambda: sink.receive(event), f"failed after step {event.step}")
        if not kept and isinstance(event, self._takes):
            self.lost += 1

    def close(self) -> None:
        """Close the sink. One that failed is not asked to flush: it would wait for what is not there."""
        sink, self._sink = self._sink, None
        if sink is not None and (self._again or not self.reason):
            self._try(sink.close, "could not be closed")

    @property
    def loss(self) -> dict[str, Any] | None:
        """What ``run.json`` keeps of a failure: the reason, and how many records were lost."""
        return {"lost": self.lost, "reason": self.reason} if self.reason else None

    @property
    def summary(self) -> str | None:
        """What is said at the end of a run; None where nothing failed."""
        if not self.reason:
            return None
        records = f"{self.lost} record{'' if self.lost == 1 else 's'}"
        return f"warning: `{self.name}` {self._what}: {records} lost ({self.reason})"

    def _try(self, action: Callable[[], object], what: str) -> bool:
        try:
            action()
        # SystemExit too: some trackers leave the program where they are not logged in.
        except (Exception, SystemExit) as error:
            if not self.reason:
                self.reason, self._what = reason_of(error), what
                self._tell(f"warning: `{self.name}` {what}, and training goes on without it: {self.reason}")
            return False
        return True


def reason_of(error: BaseException) -> str:
    """An exception of another library in one line, without secrets: its kind, and the first line of what it says."""
    if isinstance(error, FtuneError):
        return harmless(scrub(error.message))
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        return harmless(scrub(said))
    return harmless(scrub(f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__))
