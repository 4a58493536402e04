"""Examples: token ids with what is trained of them, kept in a few arrays however many there are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

__all__ = ["IGNORE", "Example", "Examples", "Ids"]

IGNORE = -100
Ids: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Example:
    """One document.

    Attributes:
        input_ids: (L,) int32.
        labels: (L,) int32, the token itself where it is trained, else -100.
        row: The row's number in its source, counted from 0.
    """

    input_ids: Ids
    labels: Ids
    row: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def target_tokens(self) -> int:
        """Targets after the shift."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE))


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Many examples as arrays: 5 bytes a token and 16 an example; an ``Example`` is made when it is asked for.

    Attributes:
        ids: (T,) int32, the tokens of all examples, one behind the other.
        trained: (T,) bool, whether a token is its own label.
        lengths: (N,) int64, tokens of each example.
        rows: (N,) int64, the number of its row.
    """

    ids: Ids
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __post_init__(self) -> None:
        ends = np.cumsum(self.lengths)
        assert len(self.rows) == len(ends)
        assert len(self.ids) == len(self.trained) == (ends[-1] if len(ends) else 0)
        object.__setattr__(self, "_ends", ends)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...

    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        """One example, or a tuple of them."""
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        end = int(self._ends[index])  # type: ignore[attr-defined]
        place = slice(end - int(self.lengths[index]), end)
        ids = self.ids[place]
        return Example(ids, np.where(self.trained[place], ids, np.int32(IGNORE)), int(self.rows[index]))

    def fingerprint(self) -> str:
        """sha256 over ids, labels and row numbers."""
        digest = hashlib.sha256()
        for example in self:
            digest.update(np.array([example.row, len(example)], dtype="<i8").tobytes())
            digest.update(example.input_ids.astype("<i4").tobytes())
            digest.update(example.labels.astype("<i4").tobytes())
        return digest.hexdigest()

    @staticmethod
    def joined(parts: Sequence[Examples]) -> Examples:
        """The examples of several, in order."""
        return Examples(
            np.concatenate([part.ids for part in parts] or [np.zeros(0, np.int32)]),
            np.concatenate([part.trained for part in parts] or [np.zeros(0, np.bool_)]),
            np.concatenate([part.lengths for part in parts] or [np.zeros(0, np.int64)]),
            np.concatenate([part.rows for part in parts] or [np.zeros(0, np.int64)]),
        )
