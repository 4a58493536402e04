"""Where the fields of a recipe are written, and a mistake at one of these places."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["TAB", "KeyPath", "Mistake", "Position", "Positions", "Source", "Span", "dotted"]

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the recipe's root."""
TAB = 4
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


@dataclass(frozen=True)
class Source:
    """Text that a mistake can be in: a recipe file, or one ``--set`` option.

    Attributes:
        name: The file as the user named it, or ``command line``.
        text: All of it.
        rank: Order among sources in a report: 0 for the file, then the options as given.
        fields: Of a recipe that was written in Python, the dotted path of the field in each line; else empty.
    """

    name: str
    text: str
    rank: int = 0
    fields: tuple[str, ...] = ()

    @property
    def numbered(self) -> bool:
        """Whether its lines have numbers that the user knows: those of a file."""
        return self.rank == 0 and not self.fields

    def place(self, line: int, column: int) -> str:
        """What a place in it is called in a report: ``recipe.yaml:7:3``, or the path of the field."""
        if self.fields:
            return self.fields[line] if line < len(self.fields) else self.name
        return f"{self.name}:{line + 1}:{column + 1}" if self.numbered else self.name

    @cached_property
    def lines(self) -> list[str]:
        """The lines as YAML counts them."""
        return _LINE_BREAK.split(self.text)


@dataclass(frozen=True)
class Span:
    """A stretch of one line; ``line`` and ``column`` count characters from 0."""

    source: Source
    line: int
    column: int
    length: int = 1

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts spans by source, line and column."""
        return (self.source.rank, self.line, self.column)


@dataclass(frozen=True)
class Position:
    """Where one field is written.

    Attributes:
        key: Its key, or its value when it has no key (list entries, short forms).
        value: Its value; the first line of it when there are several.
        block: Whether the value is a collection: a mistake about all of it is shown at the key.
    """

    key: Span
    value: Span
    block: bool = False


@dataclass
class Positions:
    """Where each field of a recipe is written, by its path."""

    source: Source
    at: dict[KeyPath, Position] = field(default_factory=dict)

    def nearest(self, path: KeyPath) -> tuple[KeyPath, Position] | None:
        """The position of a field, else of the closest block around it that is written."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.at:
                return path[:end], self.at[path[:end]]
        return None

    def forget(self, path: KeyPath) -> None:
        """Drop a field and everything under it."""
        for known in [known for known in self.at if known[: len(path)] == path]:
            del self.at[known]


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong.

    Attributes:
        message: What, in one line without a full stop.
        span: Where; None when it is about the whole source.
        label: How to mend it, in a few words behind the caret.
        help: How to mend it, in a sentence of its own.
        also: An earlier place that matters, with a label (the first of two equal keys).
    """

    message: str
    span: Span | None = None
    label: str = ""
    help: str | None = None
    also: tuple[Span, str] | None = None


def dotted(path: Iterable[str | int]) -> str:
    """A path as ``--set`` takes it: ``evaluation.metrics.0.name``."""
    return ".".join(map(str, path))
