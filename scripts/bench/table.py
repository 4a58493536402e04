"""Tables in Markdown."""

from __future__ import annotations


def table(columns: list[str], rows: list[list[str]]) -> str:
    """One line for the columns, and one for each row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
