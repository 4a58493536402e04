"""Which documents share a row: best-fit decreasing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

__all__ = ["fill", "pack"]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put documents into as few rows as best-fit decreasing finds, without splitting any.

    lengths: tokens of each document, each from 1 to ``capacity``. Returns, for each row, the indices of its
    documents; every index appears once. The same lengths always give the same rows. Takes O(n log n) steps
    for the order and, for each document, a look-up among the distinct free lengths, of which there are at
    most ``capacity``. Raises ValueError if a document is empty or longer than ``capacity``.
    Source: Johnson, Near-optimal bin packing algorithms, 1973.
    """
    if len(lengths) and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths from {min(lengths)} to {max(lengths)} do not fit rows of {capacity} tokens")
    rows: list[list[int]] = []
    free: list[int] = []  # distinct free lengths > 0 of the rows so far, ascending
    rows_by_free: dict[int, list[int]] = {}
    # sorted is stable: documents of one length stay in the order of their indices
    for document in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[document]
        place = bisect_left(free, length)
        if place == len(free):
            row, left = len(rows), capacity - length
            rows.append([document])
        else:
            room = free[place]
            row, left = rows_by_free[room].pop(), room - length
            if not rows_by_free[room]:
                del rows_by_free[room], free[place]
            rows[row].append(document)
        if left > 0:
            if left not in rows_by_free:
                insort(free, left)
                rows_by_free[left] = []
            rows_by_free[left].append(row)
    return rows


def fill(lengths: Sequence[int], rows: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the rows' places that hold a token; 1 is a perfect packing."""
    return sum(lengths[i] for row in rows for i in row) / (len(rows) * capacity) if rows else 1.0
