"""Fields that recipes had in earlier versions: what was written then still loads where it changes nothing.

A recipe that gives such a field the value that is all there is now is read as if it had left it out. Any other value
is a mistake that says what to do. In the record of a run of before, which nobody edits, any value is passed over.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftune.recipe.places import KeyPath, Mistake, Positions, dotted

__all__ = ["REMOVED", "Removed", "take_removed", "without_removed"]


@dataclass(frozen=True)
class Removed:
    """What became of a field.

    Attributes:
        same: The value that means what now always happens.
        help: What to do where it has another one, and why it was removed.
    """

    same: object
    help: str


REMOVED: dict[KeyPath, Removed] = {
    ("training", "compile"): Removed(
        False, "remove the line: compiled norms and gates gained 2 % of the time on a CPU, so ftune compiles no more"
    ),
}
"""By path from the recipe's root; no field of the schema is among them."""


def _block(raw: Any, path: KeyPath) -> dict[Any, Any] | None:
    """The block that has a field at ``path``; None where there is no such field."""
    for key in path[:-1]:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw if isinstance(raw, dict) and path[-1] in raw else None


def take_removed(raw: dict[str, Any], positions: Positions) -> list[Mistake]:
    """Take removed fields out of a recipe's plain data, in place; returns a mistake for each that asks for something.

    Args:
        raw: The recipe as written, after overrides; values that come from variables are as YAML reads them.
        positions: Where its fields are written; those of removed fields are forgotten.
    """
    mistakes = []
    for path, removed in REMOVED.items():
        block = _block(raw, path)
        if block is None:
            continue
        value = block.pop(path[-1])
        if getattr(value, "typed", value) is not removed.same:
            at = positions.at.get(path)
            mistakes.append(Mistake(f"`{dotted(path)}` was removed", at.key if at else None, help=removed.help))
        positions.at.pop(path, None)
    return mistakes


def without_removed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the recipe that a run of before keeps, as resolved, without the fields that were removed since."""
    kept = copy.deepcopy(dict(stored))
    for path in REMOVED:
        if (block := _block(kept, path)) is not None:
            del block[path[-1]]
    return kept
