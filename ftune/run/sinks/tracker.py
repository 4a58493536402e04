"""Other people's trackers (tensorboard, wandb, mlflow, ...), through accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftune.run.events import EvalEnd, Event, StepEnd
from ftune.scrub import scrub_data

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrackerSink"]


class TrackerSink:
    """Log the numbers of steps and evaluations.

    Args:
        accelerator: Made with ``log_with`` naming the trackers.
        project: The project's name in them.
        settings: The resolved recipe, flat: ``{"method.rank": 16, ...}``.
    """

    def __init__(self, accelerator: Accelerator, project: str, settings: dict[str, Any]) -> None:
        self._accelerator = accelerator
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
        accelerator.init_trackers(project, config=scrub_data(plain))

    def receive(self, event: Event) -> None:
        """Log one event's numbers."""
        if isinstance(event, StepEnd | EvalEnd):
            prefix = "eval" if isinstance(event, EvalEnd) else "train"
            numbers = {f"{prefix}/{k}": v for k, v in event.as_dict().items() if isinstance(v, int | float)}
            numbers.pop(f"{prefix}/step")
            self._accelerator.log(numbers, step=event.step)

    def close(self) -> None:
        """Let the trackers flush."""
        # Not end_training: that also ends the process group, which the other processes still need.
        for tracker in self._accelerator.trackers:
            tracker.finish()


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
