"""What tokenizing leaves: examples, their counts, and prompts to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ftune.data.answers import Answer
from ftune.data.examples import Examples, Ids
from ftune.data.formats import Format
from ftune.data.overlap import Overlap, overlap
from ftune.data.sources import Rows

if TYPE_CHECKING:
    pass

__all__ = ["GenerationItem", "Split", "Splits", "Stats"]


@dataclass(frozen=True)
class Stats:
    """Counts of a split; of the tokens and examples those that were kept, where nothing else is said.

    Attributes:
        rows: Rows of the source.
        examples: Rows that became examples.
        tokens: Tokens.
        target_tokens: Tokens in the loss.
        truncated: Examples cut to ``max_length``.
        cut_answers: Of these, those that lost their last trained token: the end of the answer.
        split: Rows that became several examples.
        lost_tokens: Tokens cut off, or left out with their row, for being behind ``max_length``.
        lost_target_tokens: Of these, those that would have been in the loss.
        skipped: Rows left out for being longer than ``max_length``.
        no_target: Rows left out because no trained token was left in them.
        ends_with_eos: Share of the untruncated examples whose last trained token is a special token (end of
            turn or end of sequence); 0 where none is untruncated.
        longest: Tokens of the longest example.
        longest_before: Tokens of the longest row, before truncation.
        notes: What to tell of rows, and of how many.
        control: Conversations whose own text has a control token in it.
        control_first: The first of these, counted from 1, and its token; None where there is none.
    """

    rows: int
    examples: int
    tokens: int
    target_tokens: int
    truncated: int
    skipped: int
    no_target: int
    ends_with_eos: float
    longest: int
    longest_before: int
    cut_answers: int = 0
    split: int = 0
    lost_tokens: int = 0
    lost_target_tokens: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)
    control: int = 0
    control_first: Sequence[int | str] | None = None


@dataclass(frozen=True)
class Split:
    """The examples of one source.

    Attributes:
        examples: In the source's order; rows without a trained token are not among them.
        format: How the rows were read.
        stats: Counts.
        fingerprint: sha256 over ids, labels and row numbers.
        rows: The rows themselves, for ``generation_items``.
    """

    examples: Examples
    format: Format
    stats: Stats
    fingerprint: str
    rows: Rows


@dataclass(frozen=True)
class Splits:
    """What is trained on and what is held out."""

    train: Split
    eval: Split | None

    @cached_property
    def overlap(self) -> Overlap:
        """Held-out examples that are trained on as well, and training examples that are repeated."""
        return overlap(
            self.train.examples, self.eval.examples if self.eval else None, prompts=self.train.format != "text"
        )


@dataclass(frozen=True, slots=True)
class GenerationItem:
    """A prompt to generate from, and the answer that the data gives.

    Attributes:
        prompt_ids: (L,) int32, with the generation prompt.
        reference: The answer that the data gives, as the chat template renders it; its calls are those of the data.
        row: The row's number in its source.
    """

    prompt_ids: Ids
    reference: Answer
    row: int
