"""What each method says of itself, generated from the union: as a table, and one by one."""

from __future__ import annotations

import textwrap
from typing import Any

from ftune.artifacts.report import table
from ftune.errors import FtuneError
from ftune.methods import METHODS
from ftune.recipe.spelling import closest

__all__ = ["method_card", "method_row", "method_rows", "method_table"]

_LAYOUTS = (
    ("method", "paper", "merge", "4-bit", "packing", "trained", "what it trains"),
    ("method", "merge", "4-bit", "packing", "trained", "what it trains"),
    ("method", "merge", "4-bit", "what it trains"),
)
"""Columns of the table, widest first; the last fits 80 columns while summaries have at most 54 characters."""


def method_rows() -> list[dict[str, Any]]:
    """What each method says of itself."""
    return [
        {
            "name": name,
            "summary": cls.summary,
            "paper": cls.paper,
            "formula": cls.formula,
            "choose": cls.choose,
            "avoid": cls.avoid,
            "cost": cls.cost,
            "evidence": cls.evidence,
            "composes": cls.composes,
            "mergeable": cls.mergeable,
            "not_mergeable_because": cls.not_mergeable_because,
            "quantizable": cls.quantizable,
            "packing": cls.packable,
            "as_lora": cls.as_lora,
            "not_lora_because": cls.not_lora_because,
            "typical_share": cls.typical_share,
            "learning_rate": cls.default_learning_rate,
        }
        for name, cls in METHODS.items()
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def method_table(width: int) -> str:
    """The table as text, one method a row: the first layout that fits ``width``, each with the summary."""
    cells = [
        {
            "method": row["name"],
            "paper": row["paper"],
            "merge": _yes(row["mergeable"]),
            "4-bit": _yes(row["quantizable"]),
            "packing": _yes(row["packing"]),
            "trained": row["typical_share"],
            "what it trains": row["summary"],
        }
        for row in method_rows()
    ]
    for head in _LAYOUTS:
        text = table(head, [[row[name] for name in head] for row in cells])
        if max(map(len, text.splitlines())) <= width:
            break
    return f"{text}\n\n`ftune methods NAME` says more"


def method_row(name: str) -> dict[str, Any]:
    """What one method says of itself.

    Raises:
        FtuneError: There is no such method.
    """
    found = next((row for row in method_rows() if row["name"] == name), None)
    if found is None:
        near = closest(name, list(METHODS))
        raise FtuneError(
            f"unknown method `{name}`", help=f"did you mean `{near}`?" if near else f"methods: {', '.join(METHODS)}"
        )
    return found


def method_card(name: str, width: int) -> str:
    """All that one method says of itself, wrapped to ``width``.

    Raises:
        FtuneError: There is no such method.
    """
    found = method_row(name)
    facts = [
        ("trains", f"{found['summary']}; {found['typical_share']} of a 7B model"),
        ("formula", found["formula"]),
        ("choose it", found["choose"]),
        ("not", found["avoid"]),
        ("costs", found["cost"]),
        ("evidence", found["evidence"]),
        ("composes", found["composes"]),
        ("packing", _yes(found["packing"])),
        ("4-bit base", _yes(found["quantizable"])),
        ("merge", "exact" if found["mergeable"] else f"no: {found['not_mergeable_because']}"),
        ("as LoRA", found["as_lora"] or f"no: {found['not_lora_because']}"),
        ("rate", f"{found['learning_rate']:g} by default"),
    ]
    lines = [f"{name} ({found['paper']})"]
    for key, text in facts:
        wrapped = textwrap.wrap(text, width - 12, break_long_words=False, break_on_hyphens=False)
        lines += [f"{key if not i else '':10}  {part}" for i, part in enumerate(wrapped)]
    return "\n".join(lines)
