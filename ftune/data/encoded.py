"""Rows in tokens, as an encoder gives them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftune.data.examples import Examples, Ids

if TYPE_CHECKING:
    pass

__all__ = ["Encoded", "Part", "RowError"]


class Encoded(NamedTuple):
    """A row in tokens: (L,) int32 ids and (L,) bool for what is trained.

    Of a huge row's rest, which is cut off without being tokenized, ``behind`` is the least number of tokens, and
    ``trained_behind`` that of trained ones.
    """

    ids: Ids
    trained: NDArray[np.bool_]
    behind: int = 0
    trained_behind: int = 0


class RowError(Exception):
    """Why one row cannot be encoded; whoever knows the rows says where it is.

    Args:
        row: The row's number in its source; None where it is no matter of one row.
        message: What is wrong.
        help: How to mend it.
    """

    def __init__(self, row: int | None, message: str, help: str | None) -> None:
        # all of it in args, which is what survives the way to another process
        super().__init__(row, message, help)
        self.row, self.message, self.help = row, message, help


@dataclass(frozen=True)
class Part:
    """What some of the records became.

    Attributes:
        examples: Those that are kept, none longer than ``max_length``.
        too_long: (row, tokens) of those longer than that; of huge ones, the least that the tokens can be.
        first_targets: Of the examples without a target after the cut, where the first one was before it.
        notes: What to tell of rows, and of how many.
        truncated: Examples that are kept and were cut.
        cut_answers: Of these, those whose last trained token was cut off: the end of the turn, mostly.
        split: Rows that became several examples.
        lost_tokens: Tokens that were cut off or left out for the length of their row; of huge ones, the least.
        lost_target_tokens: Of these, those that would have been in the loss.
        no_target: Rows left out because no trained token was left in them.
        ended: Examples kept as they were whose last trained token is a special token.
        longest_before: Tokens of the longest, before the cut; at least, where it is a huge one.
        control: Rows whose own text has a control token in it, and that token.
    """

    examples: Examples
    too_long: tuple[tuple[int, int], ...] = ()
    first_targets: tuple[int, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    truncated: int = 0
    cut_answers: int = 0
    split: int = 0
    lost_tokens: int = 0
    lost_target_tokens: int = 0
    no_target: int = 0
    ended: int = 0
    longest_before: int = 0
    control: tuple[tuple[int, str], ...] = ()
