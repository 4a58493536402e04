"""Rows from files and hub data sets, each with the place it came from.

Text files are parsed here and not by ``datasets``: a mistake is then reported with its line, rows keep the keys
that they were written with (a missing key is not the same as a null), and no cache is written that two processes
could race for. Parquet and hub data sets go through ``datasets``.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ftune.errors import DataError
from ftune.recipe.schema import DataSource

__all__ = ["Rows", "load_rows"]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of one source and where each was written.

    Attributes:
        rows: The rows; a list, or a ``datasets.Dataset`` that reads them lazily.
        columns: Every key of any row, in order of first appearance.
        origin: Names of the files, or one name for a hub data set.
        fingerprint: sha256 over the bytes of the files; of a hub data set, its fingerprint in ``datasets``.
        numbers: Row number in the whole source, counted from 0, for each row here; None: 0, 1, 2, ...
        file_of: Index into ``origin`` for each row number; None: all from the first.
        line_of: Line in its file, counted from 1, for each row number; None where there are no lines.
    """

    rows: Sequence[Row]
    columns: tuple[str, ...]
    origin: tuple[str, ...]
    fingerprint: str
    numbers: tuple[int, ...] | None = None
    file_of: tuple[int, ...] | None = None
    line_of: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Each row with its number in the source."""
        if self.numbers is None:
            yield from enumerate(self.rows)
        else:
            for number in self.numbers:
                yield number, self.rows[number]

    def where(self, number: int) -> str:
        """``file:line`` of a row by its number in the source; ``file: row N`` (from 1) without lines."""
        file = self.file_of[number] if self.file_of is not None else 0
        if self.line_of is not None:
            return f"{self.origin[file]}:{self.line_of[number]}"
        first = self.file_of.index(file) if self.file_of is not None else 0
        return f"{self.origin[file]}: row {number - first + 1}"

    def select(self, numbers: Sequence[int]) -> Rows:
        """Some of the rows, by their number in the source, which they keep."""
        return replace(self, rows=_Picked(self.rows, numbers), numbers=tuple(numbers))


class _Picked(Sequence[Row]):
    """A view of some rows: as long as what was picked, indexed by the number in the source."""

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int]) -> None:
        self._rows = rows
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]
