"""A run, by its directory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune.api.results import Conversion, Evaluation, Generation, Merge
from ftune.api.shown import Shown
from ftune.api.using import convert, evaluate, generate, merge
from ftune.run.events import EvalEnd, StepEnd
from ftune.streams import terminal_width

__all__ = ["Metrics", "Run"]


@dataclass(frozen=True)
class Metrics:
    """What a run logged.

    Attributes:
        steps: One for each optimizer update: loss, learning rate, gradient norm, tokens, memory.
        evals: One for each measurement of the held-out loss.
    """

    steps: tuple[StepEnd, ...]
    evals: tuple[EvalEnd, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """The training loss of every update."""
        return tuple(step.loss for step in self.steps)


@dataclass(frozen=True, repr=False)
class Run(Shown):
    """A run; its ``repr`` is what ``ftune train`` prints at the end.

    Attributes:
        path: The run's directory. A string is taken, too: ``ftune.Run("runs/x")``.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).expanduser())

    def __fspath__(self) -> str:
        """So that a run can be given wherever its directory can."""
        return os.fspath(self.path)

    def __str__(self) -> str:
        from ftune.artifacts.report import training_summary

        if self.status in ("finished", "paused"):
            return training_summary(self.record, str(self.path), terminal_width())
        return f"{self.path}: {self.status}"

    @property
    def record(self) -> dict[str, Any]:
        """What ``run.json`` holds: the recipe, the plan, what was measured, versions, device.

        Raises:
            RunDirError: There is no run.
        """
        from ftune.artifacts.run_dir import RunDir

        return RunDir(self.path).read()

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``paused``, ``interrupted`` or ``failed``."""
        return str(self.record["status"])

    @property
    def measured(self) -> dict[str, Any]:
        """Steps, first and last loss, tokens a second, peak memory, of a run that has made steps."""
        return dict(self.record["measured"])

    @property
    def artifact(self) -> Path:
        """The trained adapter, or the model of full fine-tuning."""
        return self.path / str(self.record["plan"]["method"]["artifact"])

    @property
    def metrics(self) -> Metrics:
        """Every update and every measurement of the held-out loss, read from ``metrics.jsonl``.

        Raises:
            RunDirError: There is no run, or its recipe's ``tracking`` leaves out ``jsonl``.
        """
        from ftune.errors import RunDirError

        try:
            lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise RunDirError(
                f"{self.path} has no metrics: {error.strerror}", help="`tracking` of its recipe names `jsonl`"
            ) from error
        events = [json.loads(line) for line in lines]
        return Metrics(
            tuple(_event(StepEnd, event) for event in events if event["event"] == "step"),
            tuple(_event(EvalEnd, event) for event in events if event["event"] == "eval"),
        )

    def evaluate(self, **options: Any) -> Evaluation:
        """``ftune.evaluate`` of this run."""
        return evaluate(self, **options)

    def generate(self, prompts: str | Sequence[str], **options: Any) -> Generation:
        """``ftune.generate`` with this run."""
        return generate(self, prompts, **options)

    def merge(self, out: str | os.PathLike[str] | None = None, **options: Any) -> Merge:
        """``ftune.merge`` of this run."""
        return merge(self, out, **options)

    def convert(self, out: str | os.PathLike[str] | None = None, **options: Any) -> Conversion:
        """``ftune.convert`` of this run."""
        return convert(self, out, **options)


def _event(kind: Any, data: dict[str, Any]) -> Any:
    """An event from its line; what the method logged beside its fields is ``extra``."""
    fields = kind.__dataclass_fields__
    given = {name: value for name, value in data.items() if name in fields}
    if "extra" in fields:
        given["extra"] = {name: value for name, value in data.items() if name not in fields and name != "event"}
    return kind(**given)
