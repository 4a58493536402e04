"""What the functions on a run return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftune.api.shown import Shown
from ftune.streams import terminal_width

__all__ = ["Conversion", "Evaluation", "Generation", "Merge"]


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """What an evaluation measured; its ``repr`` is the table of ``ftune eval``.

    Attributes:
        tuned: Of the tuned model the held-out loss, perplexity and metrics, by name; None where there is no run.
        base: The same of its base; None where it was not measured.
        notes: What to know of the numbers.
        data: All of it as plain data, as ``eval.json`` keeps it.
    """

    tuned: dict[str, Any] | None
    base: dict[str, Any] | None
    notes: tuple[str, ...]
    data: dict[str, Any] = field(compare=False)

    def __str__(self) -> str:
        from ftune.artifacts.report import evaluation_table

        return evaluation_table(self.data, terminal_width())


@dataclass(frozen=True, repr=False)
class Merge(Shown):
    """A plain model that was written and compared with the tuned one.

    Attributes:
        path: Where it is.
        data: The comparison, as ``ftune merge --json`` prints it.
    """

    path: Path
    data: dict[str, Any] = field(compare=False)

    def __str__(self) -> str:
        from ftune.artifacts.report import merge_summary

        return merge_summary(self.data)


@dataclass(frozen=True, repr=False)
class Conversion(Shown):
    """A plain LoRA adapter that was written and compared with the tuned model.

    Attributes:
        path: Where it is.
        data: The comparison, as ``ftune convert --json`` prints it.
    """

    path: Path
    data: dict[str, Any] = field(compare=False)

    def __str__(self) -> str:
        from ftune.artifacts.report import convert_summary

        return convert_summary(self.data)


@dataclass(frozen=True, repr=False)
class Generation(Shown):
    """Answers, in the order of their prompts.

    Attributes:
        prompts: What was asked.
        answers: The answer to each.
        notes: What to know of the model that answered.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n\n".join(f"> {prompt}\n{answer}" for prompt, answer in zip(self.prompts, self.answers, strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> str:
        return self.answers[index]
