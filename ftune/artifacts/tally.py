"""What a run measured, added up for ``run.json``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftune.artifacts.effect import effect_of
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
    losses: list[float] = field(default_factory=list)
    last: StepEnd | None = None
    base_loss: float | None = None
    evals: list[EvalEnd] = field(default_factory=list)

    def receive(self, event: Event) -> None:
        """Add one event."""
        if isinstance(event, StepEnd):
            self.tokens += event.tokens
            self.seconds += event.seconds
            self.peak_bytes = max(self.peak_bytes, event.peak_bytes)
            self.losses.append(event.loss)
            self.last = event
        elif isinstance(event, Halved):
            self.halvings = event.halvings
        elif isinstance(event, EvalEnd):
            self.evals.append(event)
            self.base_loss = event.loss if event.step == 0 else self.base_loss

    def close(self) -> None:
        """Nothing is held."""

    def recall(self, metrics: Path, progress: dict[str, Any]) -> None:
        """Take what a resumed run did before, from its ``metrics.jsonl`` and what its checkpoint keeps."""
        self.base_loss = progress.get("base_loss")
        kinds: dict[str, type[StepEnd | EvalEnd]] = {"step": StepEnd, "eval": EvalEnd}
        for event in read_events(metrics):
            if kind := kinds.get(event["event"]):
                names = {field.name for field in dataclasses.fields(kind)} - {"extra"}
                # What is not finite was written as null. A line that somebody changed is none of this run's.
                values: dict[str, Any] = {
                    name: math.nan if event[name] is None else event[name] for name in names if name in event
                }
                if values.keys() == names and all(type(value) in (int, float) for value in values.values()):
                    self.receive(kind(**values))

    def effect(self, training: dict[str, Any]) -> dict[str, Any]:
        """Whether training made the model better (``ftune.artifacts.effect``); training: the plan's."""
        return effect_of(training, self.losses, [(event.step, event.loss) for event in self.evals], self.base_loss)

    def measured(self, predicted: int) -> dict[str, Any]:
        """Figures of this process's part of the run."""
        if self.last is None:
            return {}
        return {
            "steps": self.last.step,
            "loss": self.last.loss,
            "first_loss": self.losses[0],
            "base_loss": self.base_loss,
            "held_out_loss": next((event.loss for event in reversed(self.evals) if event.step), None),
            "halvings": self.halvings,
            "tokens": self.tokens,
            "training_seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "peak_bytes": self.peak_bytes,
            "predicted_peak_bytes": predicted,
            "predicted_over_measured": predicted / self.peak_bytes if self.peak_bytes else None,
        }
