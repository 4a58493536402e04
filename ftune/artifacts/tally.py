"""What a run measured, added up for ``run.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftune.run.events import EvalEnd, Event, Halved, StepEnd
from ftune.run.sinks.jsonl import read_events

__all__ = ["Tally"]


@dataclass
class Tally:
    """A sink that adds up what ``run.json`` reports as measured."""

    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    halvings: int = 0
    first_loss: float | None = None
    last: StepEnd | None = None
    evals: list[EvalEnd] = field(default_factory=list)

    def receive(self, event: Event) -> None:
        """Add one event."""
        if isinstance(event, StepEnd):
            self.tokens += event.tokens
            self.seconds += event.seconds
            self.peak_bytes = max(self.peak_bytes, event.peak_bytes)
            self.first_loss = event.loss if self.first_loss is None else self.first_loss
            self.last = event
        elif isinstance(event, Halved):
            self.halvings = event.halvings
        elif isinstance(event, EvalEnd):
            self.evals.append(event)

    def close(self) -> None:
        """Nothing is held."""

    def recall(self, metrics: Path) -> None:
        """Take the steps that a resumed run made before, from its ``metrics.jsonl``."""
        names = {field.name for field in dataclasses.fields(StepEnd)} - {"extra"}
        for event in read_events(metrics):
            if event["event"] == "step":
                self.receive(StepEnd(**{name: event[name] for name in names}))

    def measured(self, predicted: int) -> dict[str, Any]:
        """Figures of this process's part of the run."""
        if self.last is None:
            return {}
        return {
            "steps": self.last.step,
            "loss": self.last.loss,
            "first_loss": self.first_loss,
            "held_out_loss": self.evals[-1].loss if self.evals else None,
            "halvings": self.halvings,
            "tokens": self.tokens,
            "training_seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "peak_bytes": self.peak_bytes,
            "predicted_peak_bytes": predicted,
            "predicted_over_measured": predicted / self.peak_bytes if self.peak_bytes else None,
        }
