"""Text of a model or a file, made fit for a terminal."""

from __future__ import annotations

import unicodedata

__all__ = ["clip", "printable", "width_of"]


def printable(text: str, *, lines: bool = False) -> str:
    """The text with a mark in place of each control character, of which a terminal would make commands.

    Args:
        text: What is to be printed.
        lines: Whether line breaks and tabs stay.
    """
    kept = "\n\t" if lines else ""
    return "".join(c if c in kept or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def width_of(text: str) -> int:
    """Columns that a terminal needs for a text: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )  # fmt: skip


def clip(text: str, width: int) -> str:
    """A text in one line of at most ``width`` columns; an ellipsis stands for what was cut off."""
    flat = printable(" ".join(text.split()))
    if width_of(flat) <= width:
        return flat
    kept, used = "", 0
    for char in flat:
        used += width_of(char)
        if used > max(1, width - 1):
            break
        kept += char
    return kept + "…"
