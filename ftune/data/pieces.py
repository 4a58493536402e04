"""A huge text in tokens piece by piece: in little memory, and no further than is wanted.

A piece ends where words do, which is where pre-tokenizers part a text, so its tokens are those that the whole text has
there. A text without any such place is cut all the same; there a token or two may differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftune.data.borders import Borders
from ftune.data.examples import Ids

__all__ = ["Piece", "pieces"]

PIECE = 500_000
"""Characters of a piece: 160 MB of memory at most while it is tokenized, about half a second."""
# characters before the end of a piece that are searched for a place to cut at, and places of each kind that are tried
SEARCHED = 2000
TRIED = 4
# between words; behind a line break; between a word and a mark
PLACES = [re.compile(place) for place in (r"(?<=\w)(?= [^\W\d_])", r"(?<=\n)(?=[^\W\d_])", r"(?<=\w)(?=[^\w\s])")]


class Piece(NamedTuple):
    """Characters ``start`` to ``end`` of a text: (L,) int32 ids, and (L, 2) offsets in the whole text."""

    start: int
    end: int
    ids: Ids
    offsets: NDArray[np.int64]


def pieces(text: str, borders: Borders, prompt_end: int | None) -> Iterator[Piece]:
    """The pieces of a text in order, each tokenized when it is asked for; no token lies across ``prompt_end``."""
    start = 0
    while start < len(text):
        limit = prompt_end if prompt_end is not None and start < prompt_end else len(text)
        end = _end(text, borders, start, limit)
        ids, offsets = borders.part(text, start, end)
        yield Piece(start, end, np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2))
        start = end


def _end(text: str, borders: Borders, start: int, limit: int) -> int:
    """Where the piece that begins at ``start`` ends: at the last place that is none inside a token."""
    end = start + PIECE
    if end >= limit:
        return limit
    for place in PLACES:
        found = [match.start() for match in place.finditer(text, max(start + 1, end - SEARCHED), end)]
        for at in reversed(found[-TRIED:]):
            if borders.apart(text, at):
                return at
    added = borders.added_around(text, end)
    return end if added is None or added <= start else added
