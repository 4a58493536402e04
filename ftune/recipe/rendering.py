"""Mistakes as a compiler shows them: the line, the place under it, and how to mend it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

from ftune.errors import RecipeError
from ftune.recipe.places import TAB, Mistake, Source, Span
from ftune.scrub import scrub
from ftune.streams import terminal_width

__all__ = ["MAX_REPORTS", "fail", "printable", "render"]

_RED, _YELLOW, _BLUE, _BOLD, _RESET = "\x1b[1;31m", "\x1b[1;33m", "\x1b[1;34m", "\x1b[1m", "\x1b[0m"

MAX_REPORTS = 50
"""More mistakes than this are counted, not shown."""


def render(
    mistake: Mistake,
    source: Source,
    *,
    level: Literal["error", "warning"] = "error",
    color: bool = False,
    width: int | None = None,
) -> str:
    """One report, without a newline at its end.

    Args:
        mistake: What to report.
        source: What it is about when it has no position of its own.
        level: The first word.
        color: Use ANSI colours.
        width: Columns of the terminal, to which source lines are trimmed. Default: this terminal's.
    """
    if width is None:
        width = terminal_width()
    hue = _RED if level == "error" else _YELLOW

    def paint(text: str, code: str) -> str:
        return f"{code}{text}{_RESET}" if color else text

    out = [paint(level, hue) + paint(f": {printable(mistake.message)}", _BOLD)]
    span, late = mistake.span, ""
    if span is None:
        out.append(f"  {paint('-->', _BLUE)} {printable(source.name)}")
    else:
        out.append(f"  {paint('-->', _BLUE)} {printable(span.source.place(span.line, span.column))}")
        shown = [(mistake.also[0], mistake.also[1], "-")] if mistake.also else []
        shown.append((span, mistake.label, "^"))
        digits = max(len(str(part.line + 1)) if part.source.numbered else 1 for part, _, _ in shown)
        for index, (part, label, mark) in enumerate(shown):
            number = str(part.line + 1) if part.source.numbered else ""
            if index and part.line > shown[index - 1][0].line + 1:
                out.append("...")
            line, column, cells = _window(part, max(width - digits - 3, 40))
            gutter = paint(f"{number:>{digits}} |", _BLUE)
            out.append(f"{gutter} {line}".rstrip())
            label = printable(label)
            if label and digits + 3 + column + cells + 1 + _cells(label) > max(width, 60):
                late, label = label, ""
            gutter = paint(f"{'':>{digits}} |", _BLUE)
            out.append(f"{gutter} {' ' * column}{paint(mark * cells, hue)} {paint(label, hue)}".rstrip(" "))
            if color and not label:
                out[-1] = f"{gutter} {' ' * column}{paint(mark * cells, hue)}"
    for text in (late, mistake.help):
        if text:
            out.append(f"  {paint('help:', _BLUE)} {printable(text)}")
    return "\n".join(out)


def fail(mistakes: Sequence[Mistake], source: Source, *, color: bool = False) -> RecipeError:
    """Every mistake, sorted by position, as the exception to raise."""
    ordered = sorted(dict.fromkeys(mistakes), key=lambda m: m.span.order if m.span else (-1, 0, 0))
    reports = [render(mistake, source, color=color) for mistake in ordered[:MAX_REPORTS]]
    if len(ordered) > MAX_REPORTS:
        reports.append(f"error: {len(ordered) - MAX_REPORTS} more mistakes are not shown")
    return RecipeError(reports)


def printable(text: str) -> str:
    """The text with control characters replaced: a recipe must not steer the terminal, nor flood it."""
    if len(text) > 1:  # source lines come scrubbed, character by character
        text = scrub(text)
    if len(text) > 1000:
        text = f"{text[:500]}\u2026{text[-100:]}"
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def _cell(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(map(_cell, text))


def _window(span: Span, width: int) -> tuple[str, int, int]:
    """The part of a line to show: its text, and column and width of the caret, in terminal cells."""
    line = scrub(span.source.lines[span.line]) if span.line < len(span.source.lines) else ""
    # What is farther from the caret than a whole screen cannot be shown: lines may be very long.
    skipped = max(span.column - 2 * width, 0)
    length = min(span.length, width)
    pieces: list[str] = []
    edges = [0]  # cells before each piece
    for character in line[skipped : span.column + length + 2 * width]:
        # Tab stops are relative to the line's own start, so that carets stay below what they mark.
        piece = " " * (TAB - edges[-1] % TAB) if character == "\t" else printable(character)
        pieces.append(piece)
        edges.append(edges[-1] + _cells(piece))
    first = min(span.column - skipped, len(pieces))
    last = min(first + length, len(pieces))
    cells = max(edges[last] - edges[first], 1)
    if not skipped and edges[-1] <= width:
        return "".join(pieces), edges[first], cells
    # Keep the caret in the left half: labels stand to its right.
    cells = min(cells, width // 2)
    lead = max(width // 2 - cells, 8)
    start = next(index for index in range(first + 1) if edges[first] - edges[index] <= lead)
    text = "\u2026" if start or skipped else ""
    column = edges[first] - edges[start] + len(text)
    stop = len(pieces)
    if edges[stop] - edges[start] + len(text) > width:
        stop = max(i for i in range(start, stop) if edges[i] - edges[start] + len(text) <= width - 1)
    return text + "".join(pieces[start:stop]) + ("\u2026" if stop < len(pieces) else ""), column, cells
