"""The table of methods, generated from the union."""

from __future__ import annotations

from typing import Any

from ftune.artifacts.report import table
from ftune.methods import METHODS

__all__ = ["method_rows", "method_table"]


def method_rows() -> list[dict[str, Any]]:
    """What each method says of itself."""
    return [
        {
            "name": name,
            "summary": cls.summary,
            "paper": cls.paper,
            "formula": cls.formula,
            "mergeable": cls.mergeable,
            "quantizable": cls.quantizable,
            "packing": cls.packable,
            "typical_share": cls.typical_share,
            "learning_rate": cls.default_learning_rate,
        }
        for name, cls in METHODS.items()
    ]


def method_table(width: int) -> str:
    """The table as text, one method a row; the summary is left out where it does not fit ``width``."""

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    rows = [
        [
            row["name"],
            row["paper"],
            yes(row["mergeable"]),
            yes(row["quantizable"]),
            yes(row["packing"]),
            row["typical_share"],
            row["summary"],
        ]
        for row in method_rows()
    ]
    head = ["method", "paper", "merge", "4-bit", "packing", "trained", "what it trains"]
    whole = table(head, rows)
    if max(len(line) for line in whole.splitlines()) <= width:
        return whole
    return table(head[:-1], [row[:-1] for row in rows])
