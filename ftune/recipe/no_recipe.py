"""Files that are named as a recipe and are something else: what they are, and what to write instead."""

from __future__ import annotations

import re
from pathlib import Path

from ftune.recipe.data_files import ADVICE, DATA_SUFFIXES
from ftune.recipe.places import Mistake
from ftune.recipe.schema import Recipe

__all__ = ["other_kind"]

_TABLES = {*DATA_SUFFIXES, *ADVICE} - {".json", ".txt", ".md", ".html", ".pdf", ".docx"}
_JSON_FIELD = re.compile(rb'"(' + "|".join(Recipe.model_fields).encode() + rb')"\s*:')


def other_kind(path: Path, data: bytes) -> Mistake | None:
    """What a file is that is no recipe: rows (by its name, or as JSON) or TOML (by its name). None for all else.

    Args:
        path: The file, as it was named.
        data: Its first bytes.
    """
    suffix = path.suffix.lower()
    rows = suffix == ".json" and (data.lstrip().startswith(b"[") or (b'"' in data and not _JSON_FIELD.search(data)))
    if suffix in _TABLES or rows:
        advice, named = (f"{ADVICE[suffix]}; then ", "FILE") if suffix in ADVICE else ("", path)
        return Mistake(
            "this is a data file, and not a recipe",
            help=f"{advice}`ftune init lora --data {named}` writes a recipe for it",
        )
    if suffix == ".toml":
        return Mistake(
            "this is TOML, and recipes are YAML",
            help='`[model]` and `id = "x"` are `model: {id: x}` in YAML; `ftune init` writes a whole recipe',
        )
    return None
