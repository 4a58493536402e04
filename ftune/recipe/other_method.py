"""``--set method=NAME``: another method, with the settings of the recipe's own that it takes too."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ftune.methods import METHODS
from ftune.recipe.variables import frozen

__all__ = ["of_another_method"]

OTHER_RATE = 3.0
"""How far apart two methods' own learning rates are, one over the other, before a rate of the one is doubted."""


def of_another_method(raw: dict[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """The recipe's ``method`` block for another method, and notes on what becomes of its settings.

    A setting stays where the new method has a field of that name that takes the value.

    Args:
        raw: The recipe as plain data, short forms expanded.
        name: A key of ``METHODS``.
    """
    now: dict[str, Any] = {"name": name}
    block = raw.get("method")
    old = dict(block) if isinstance(block, dict) else {}
    before = old.pop("name", None)
    if before == name:
        return {"name": name, **old}, []
    dropped = []
    for field, value in old.items():
        try:
            METHODS[name].model_validate(frozen({**now, field: value}), strict=True)
        except ValidationError:
            dropped.append(field)
        else:
            now[field] = value
    notes = []
    kept = [field for field in now if field != "name"]
    parts = [f"keeps {_listed(kept)}"] if kept else []
    parts += [f"leaves out {_listed(dropped)}, which `{name}` does not take"] if dropped else []
    if parts:
        notes.append(f"note: `method: {name}` in place of `{before}` {' and '.join(parts)}")
    notes += _rate(raw, before, name)
    return now, notes


def _rate(raw: dict[str, Any], before: Any, name: str) -> list[str]:
    """A word on a rate that was chosen for a method which needs another."""
    optimizer = raw.get("optimizer")
    rate = optimizer.get("learning_rate") if isinstance(optimizer, dict) else None
    if before not in METHODS or not isinstance(rate, int | float):
        return []
    old, new = (METHODS[each].default_learning_rate for each in (before, name))
    if max(old, new) < OTHER_RATE * min(old, new):
        return []
    return [
        f"note: `optimizer.learning_rate: {rate:g}` was given for `{before}`, whose own is {old:g}; `{name}`'s own is "
        f"{new:g}: --set optimizer.learning_rate=null takes that"
    ]


def _listed(fields: list[str]) -> str:
    return ", ".join(f"`{field}`" for field in fields)
