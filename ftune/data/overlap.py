"""Rows that are held out and trained on as well, and rows that are trained on twice: found by their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ftune.data.examples import Examples

__all__ = ["Overlap", "overlap", "told"]


@dataclass(frozen=True)
class Overlap:
    """How many examples are the same as others.

    Attributes:
        held_out: Held-out examples.
        whole: Held-out examples that are trained on, to the last token.
        prompts: Further ones whose prompt is trained on, with another answer.
        train: Training examples.
        repeated: Training examples that are the same as one before them.
    """

    held_out: int
    whole: int
    prompts: int
    train: int
    repeated: int


def overlap(train: Examples, held_out: Examples | None, *, prompts: bool) -> Overlap:
    """Compare examples by what the model is given: token ids, and which of them are trained.

    Args:
        train: Training examples.
        held_out: Held-out examples, if there are any.
        prompts: Whether examples have prompts: tokens before the last ones that are trained.
    """
    wholes: set[int] = set()
    asked: set[int] = set()
    for whole, prompt in _hashes(train):
        wholes.add(whole)
        asked.add(prompt)
    both = only_prompt = 0
    for whole, prompt in _hashes(held_out) if held_out is not None else ():
        both += whole in wholes
        only_prompt += prompts and prompt != NO_PROMPT and whole not in wholes and prompt in asked
    count = len(held_out) if held_out is not None else 0
    return Overlap(count, both, only_prompt, len(train), len(train) - len(wholes))


NO_PROMPT = 0
AT_ONCE = 4_096
"""Examples whose positions are kept at a time."""


def _hashes(examples: Examples) -> Iterator[tuple[int, int]]:
    """A number for each example's tokens, and one for those before its last trained ones; 0 without any."""
    ends = np.cumsum(examples.lengths)
    starts = ends - examples.lengths
    for first in range(0, len(examples), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        begin, end = int(starts[first]), int(ends[part][-1])
        ids, trained = examples.ids[begin:end].tobytes(), examples.trained[begin:end]
        marks, width = trained.tobytes(), examples.ids.itemsize
        here = starts[part] - begin
        position = np.arange(end - begin)
        last_trained = np.maximum.reduceat(np.where(trained, position, -1), here)
        before = ~trained & (position < np.repeat(last_trained, examples.lengths[part]))
        prompt_ends = np.maximum.reduceat(np.where(before, position + 1, -1), here)
        for start, stop, prompt in zip(here.tolist(), (ends[part] - begin).tolist(), prompt_ends.tolist(), strict=True):
            asked = hash(ids[width * start : width * prompt]) if prompt > start else NO_PROMPT
            yield hash((ids[width * start : width * stop], marks[start:stop])), asked


def told(found: Overlap) -> list[str]:
    """What to say of it, one sentence for each fact."""
    said = []
    if found.whole or found.prompts:
        parts = [f"{found.whole:,} to the last token"] if found.whole else []
        parts += [f"{found.prompts:,} with the same prompt and another answer"] if found.prompts else []
        said.append(
            f"{found.whole + found.prompts:,} of {found.held_out:,} held-out examples are trained on as well "
            f"({', '.join(parts)}): for new rows the loss is higher than what is measured on these"
        )
    if found.repeated:
        said.append(f"{found.repeated:,} of {found.train:,} training examples are the same as one before them")
    return said
