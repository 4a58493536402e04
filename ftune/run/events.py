"""What happens in a run, as values. Sinks receive them; they never touch training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

__all__ = [
    "EvalEnd",
    "Event",
    "Note",
    "Resumed",
    "RunEnd",
    "RunStart",
    "Saved",
    "Sink",
    "StepEnd",
    "Vitals",
    "Working",
]


@dataclass(frozen=True)
class Event:
    """Something that happened after ``step`` updates."""

    logged: ClassVar[bool] = True
    """Whether it is kept; else it is only shown while it lasts."""

    step: int

    @property
    def name(self) -> str:
        """The event's name in ``metrics.jsonl``."""
        return _NAMES[type(self)]

    def as_dict(self) -> dict[str, Any]:
        """The event as one JSON object, ``extra`` spread into it."""
        data = asdict(self)
        return {
            "event": self.name,
            **{k: v for k, v in data.items() if k != "extra"},
            **data.get("extra", {}),
        }


@dataclass(frozen=True)
class RunStart(Event):
    """Training is about to begin."""

    total_steps: int


@dataclass(frozen=True)
class Resumed(Event):
    """A checkpoint was loaded."""

    checkpoint: str


@dataclass(frozen=True)
class Working(Event):
    """Something that takes long is under way, of which no number is known yet.

    Attributes:
        what: ``update``, the first of this process, or ``held-out loss``.
        done: Micro-batches of the update that were computed.
        of: How many it has; 0 where that is not counted.
    """

    logged: ClassVar[bool] = False

    what: str
    done: int = 0
    of: int = 0


@dataclass(frozen=True)
class Note(Event):
    """Something that the user should know."""

    logged: ClassVar[bool] = False

    text: str


@dataclass(frozen=True)
class Halved(Event):
    """Memory ran out after ``step`` updates, and micro-batches are smaller from then on.

    Attributes:
        halvings: How often, since the run began.
        before: Micro-batches in this update, of the process where it ran out, until now.
        now: The same from now on.
    """

    halvings: int
    before: int
    now: int


@dataclass(frozen=True)
class StepEnd(Event):
    """One optimizer update.

    Attributes:
        loss: Mean loss for each target token of the whole update, over all processes.
        learning_rate: Of this update, for the first parameter group.
        grad_norm: Global gradient norm before clipping.
        tokens: Real tokens seen in this update, padding not counted.
        target_tokens: Of these, tokens in the loss.
        tokens_per_second: Real tokens in this update over its time.
        peak_bytes: Peak memory since training began: allocated on the device, resident on a CPU.
        seconds: Time of this update.
        epoch: Passes over the data so far.
        extra: What the method logs.
    """

    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    target_tokens: int
    tokens_per_second: float
    peak_bytes: int
    seconds: float
    epoch: float
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalEnd(Event):
    """The held-out loss was measured."""

    loss: float
    perplexity: float
    target_tokens: int
    seconds: float


@dataclass(frozen=True)
class Vitals(Event):
    """Numbers that show whether the method is at work."""

    extra: dict[str, float]


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint, or the trained adapter or model, is complete on disk."""

    path: str
    seconds: float = 0.0


@dataclass(frozen=True)
class RunEnd(Event):
    """The run is over, with what it measured."""

    status: str
    extra: dict[str, Any] = field(default_factory=dict)


_NAMES: dict[type[Event], str] = {
    RunStart: "start",
    Resumed: "resume",
    Halved: "halved",
    Working: "working",
    Note: "note",
    StepEnd: "step",
    EvalEnd: "eval",
    Vitals: "vitals",
    Saved: "saved",
    RunEnd: "end",
}


class Sink(Protocol):
    """Receives events, on the main process only."""

    def receive(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """No more events come."""
