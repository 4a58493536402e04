"""The answers that a model gave to rows, with their scores: ``predictions.jsonl``, read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ftune.artifacts.paired import difference
from ftune.errors import RunDirError

__all__ = ["Answered", "interval", "read_answers"]


@dataclass(frozen=True)
class Answered:
    """One row.

    Attributes:
        prompt: What the model was given.
        reference: The right answer.
        answer: The model's.
        scores: By metric, 0 to 1.
    """

    prompt: str
    reference: str
    answer: str
    scores: Mapping[str, float]


def read_answers(out: Path, who: str) -> dict[int, Answered]:
    """The answers that were kept in a directory, by the number of their row.

    Args:
        out: Where ``predictions.jsonl`` is.
        who: Whose answers: ``base`` or ``tuned``.

    Raises:
        RunDirError: It is not there, or is damaged.
    """
    path = out / "predictions.jsonl"
    try:
        with path.open(encoding="utf-8") as file:  # its lines; splitlines would part a text at U+2028 too
            rows = [json.loads(line) for line in file]
        return {
            row["row"]: Answered(row["prompt"], row["reference"], row[who]["answer"], row[who].get("scores", {}))
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirError(
            f"{path} cannot be read: {error}", help="delete it: `ftune eval` or `ftune compare` makes it again"
        ) from error


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two scores or more, each 0 to 1."""
    # Around the middle of the range the two items that are added are one right and one wrong.
    found = difference(np.array([scores]) - 0.5)
    return max(0.0, round(found.lo + 0.5, 6)), min(1.0, round(found.hi + 0.5, 6))
