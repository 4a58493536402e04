"""What was meant by a field that is unknown or missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from ftune.methods import METHODS
from ftune.recipe.other_tools import ELSEWHERE, GENERIC, HERE, NO_FIELD, NOTES
from ftune.recipe.places import KeyPath, dotted
from ftune.recipe.schema import ColumnMap, Recipe
from ftune.recipe.spelling import closest

__all__ = ["either", "exists", "model_at", "models_in", "required_instead", "suggest_field", "ticked", "value_at"]


def ticked(words: Iterable[str]) -> str:
    """Words between backticks, with commas."""
    return ", ".join(f"`{word}`" for word in words)


def either(words: Sequence[str]) -> str:
    """``a, b or c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every pydantic model that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def model_at(path: KeyPath, raw: Any) -> type[BaseModel] | None:
    """The block that stands at a path; for the method's block, the one that ``raw`` names."""
    model: type[BaseModel] = Recipe
    for index, key in enumerate(path):
        if isinstance(key, int):
            continue
        if path[: index + 1] == ("method",):
            method = raw.get("method") if isinstance(raw, Mapping) else None
            name = method.get("name") if isinstance(method, Mapping) else None
            if not isinstance(name, str) or name not in METHODS:
                return None
            model = METHODS[name]
            continue
        info = model.model_fields.get(key)
        found = next(models_in(info.annotation), None) if info else None
        if found is None:
            return None
        model = found
    return model


def _blocks(raw: Any) -> dict[str, type[BaseModel]]:
    """The recipe's top-level blocks by name."""
    found = {name: model_at((name,), raw) for name in Recipe.model_fields}
    return {name: model for name, model in found.items() if model is not None}


def suggest_field(path: KeyPath, raw: Any) -> tuple[str, str | None]:
    """Label and help for an unknown field."""
    word, parent = path[-1], path[:-1]
    name, block = str(word), dotted(parent)
    here = model_at(parent, raw)
    siblings = list(here.model_fields) if here else []
    blocks = _blocks(raw)

    def note(field: str) -> str | None:
        return f"`{field}` is {NOTES[name]}" if name in NOTES else None

    if parent and name in Recipe.model_fields:
        return f"`{name}` stands beside `{parent[0]}`, not in it", None
    local = HERE.get((block, name), "")
    if local in siblings:
        return f"did you mean `{local}`?", note(local)
    if block.endswith(".columns") and (meant := value_at(path, raw)) in siblings:
        return f"write `{meant}: {name}`", None
    elsewhere = local or ELSEWHERE.get(name, "")
    if len(parent) == 2 and parent[0] == "data" and name in ColumnMap.model_fields:
        elsewhere = f"{block}.columns.{name}"
    if elsewhere and elsewhere != dotted(path) and exists(elsewhere, raw):
        inside, _, field = elsewhere.rpartition(".")
        label = f"did you mean `{field}`?" if inside == block else f"write it as `{elsewhere}`"
        return label, note(field)
    if other := _of_other_methods(elsewhere or (dotted(path) if parent == ("method",) else ""), word, raw):
        return other
    if name in NO_FIELD:
        return "", NO_FIELD[name]
    homes = [home for home, model in blocks.items() if name in model.model_fields and (home,) != parent]
    if not parent:
        homes = [home for home in homes if home != "data"] or homes
    if 1 <= len(homes) <= 2 and not closest(word, siblings, 1):
        return f"`{word}` belongs to {either([f'`{home}`' for home in homes])}", None
    if near := closest(word, siblings, 0 if name in GENERIC else 3):
        return f"did you mean `{near}`?", None
    far = {field: f"{home}.{field}" for home, model in blocks.items() for field in model.model_fields}
    # a name that several blocks have says nothing of which was meant
    far = {field: home for field, home in far.items() if field != name}
    far |= {field: field for field in Recipe.model_fields}
    if near := closest(word, far, 0 if name in GENERIC else 2):
        return f"did you mean `{far[near]}`?", None
    if meant := required_instead(parent, raw):
        return f"did you mean `{meant}`?", None
    where = "the recipe" if not parent else f"`{dotted(parent)}`"
    return "", f"fields of {where}: {', '.join(siblings)}" if siblings else None


def value_at(path: KeyPath, raw: Any) -> Any:
    """What a recipe has at a path, which must be there."""
    for key in path:
        raw = raw[key]
    return raw


def _of_other_methods(path: str, word: str | int, raw: Any) -> tuple[str, str | None] | None:
    """Label and help for a field of ``method`` that the recipe's method does not have and others do."""
    block, _, name = path.partition(".")
    name = name.partition(".")[0]
    if block != "method":
        return None
    method = raw["method"]["name"] if model_at(("method",), raw) else None
    if name == "quantization" and method is not None and not METHODS[method].quantizable:
        able = [f"`{other}`" for other, cls in METHODS.items() if cls.quantizable]
        return "", f"`{method}` needs unquantized base weights: remove it, or use {either(able)}"
    owners = [f"`{other}`" for other, cls in METHODS.items() if name in cls.model_fields]
    if not owners:
        return None
    return f"{'' if name == word else f'`{name}`, '}a field of {either(owners)}", None


def required_instead(block: KeyPath, raw: Any) -> str | None:
    """The one required field that a block lacks, where one key that it does not know stands in it instead."""
    model, written = model_at(block, raw), raw
    for key in block:
        written = written[key]
    if not block or model is None:
        return None
    lacking = [name for name, info in model.model_fields.items() if info.is_required() and name not in written]
    unknown = [key for key in written if key not in model.model_fields]
    return lacking[0] if len(lacking) == len(unknown) == 1 else None


def exists(path: str, raw: Any) -> bool:
    """Whether a dotted field exists for the method that the recipe names."""
    *parent, name = path.split(".")
    model = model_at(tuple(parent), raw)
    return model is not None and name in model.model_fields
