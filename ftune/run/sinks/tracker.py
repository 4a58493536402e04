"""Other people's trackers (tensorboard, wandb, mlflow, ...), through accelerate's classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftune.run.events import EvalEnd, Event, StepEnd
from ftune.scrub import scrub_data

__all__ = ["TRACKED", "TrackerSink", "flatten"]

TRACKED = (StepEnd, EvalEnd)
"""Events whose numbers a tracker gets."""


class TrackerSink:
    """Log the numbers of steps and evaluations to one tracker.

    Args:
        name: accelerate's name of it.
        project: The project's name in it.
        settings: The resolved recipe, flat: ``{"method.rank": 16, ...}``.
        directory: Where it writes, if it writes files.
    """

    def __init__(self, name: str, project: str, settings: dict[str, Any], directory: Path) -> None:
        # One by one, not by Accelerator.init_trackers: one that fails must not take the others with it.
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        made = LOGGER_TYPE_TO_CLASS[name]
        self._tracker = made(project, str(directory)) if made.requires_logging_directory else made(project)
        self._tracker.start()
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
        self._tracker.store_init_configuration(scrub_data(plain))

    def receive(self, event: Event) -> None:
        """Log one event's numbers."""
        if isinstance(event, TRACKED):
            prefix = "eval" if isinstance(event, EvalEnd) else "train"
            numbers = {f"{prefix}/{k}": v for k, v in event.as_dict().items() if isinstance(v, int | float)}
            numbers.pop(f"{prefix}/step")
            self._tracker.log(numbers, step=event.step)

    def close(self) -> None:
        """Let the tracker flush."""
        self._tracker.finish()


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
