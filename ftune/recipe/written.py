"""A recipe that is written in Python: a mapping of fields becomes YAML, and is read as any other recipe.

So there is one way in: the same validation, the same reports, and a text that ``ftune train`` trains alike. A report
names the field where it would name a file's line::

    error: unknown field `rnak` for method `lora`
      --> method.rnak
      |   rnak: 16
      |   ^^^^ did you mean `rank`?
"""

from __future__ import annotations

import json
import math
import numbers
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ftune.recipe.load import MAX_DEPTH, Loaded, is_plain_string, parse_source
from ftune.recipe.places import KeyPath, Mistake, Source, Span, dotted
from ftune.recipe.rendering import fail
from ftune.recipe.variables import Expanded

__all__ = ["options_of", "parse_fields", "recipe_text"]

_VARIABLE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-[A-Za-z0-9_.+-]*)?\}")
"""A value that is one variable: unquoted, so that a number can come of it, as in a file."""
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]")
"""What YAML does not allow as it is, or takes for the end of a line, beside what JSON escapes."""

_Line = tuple[str, KeyPath]


def parse_fields(
    fields: Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = (), *, name: str = "the recipe"
) -> Loaded:
    """Validate a recipe given as a mapping; its ``text`` is the same recipe as YAML, before ``overrides``.

    Args:
        fields: What a recipe holds. Blocks may be mappings, the short forms of YAML, or objects of the schema; a path
            may be a ``Path``; ``${NAME}`` in a string stands for a variable of the environment, as in a file.
        overrides: As ``options_of`` takes them, or ``dotted.key=value`` strings.
        name: What the recipe is called where no field is to be named.

    Raises:
        RecipeError: Names every mistake, each by the path of its field.
    """
    lines = _written(fields)
    source = Source(name, "".join(f"{line}\n" for line, _ in lines), fields=tuple(dotted(path) for _, path in lines))
    return parse_source(source, options_of(overrides), flag="")


def recipe_text(loaded: Loaded) -> str:
    """A recipe as YAML, with its overrides: as it was written where there are none."""
    if not loaded.overrides:
        return loaded.text
    return "".join(f"{line}\n" for line, _ in _written(loaded.raw, literal=True))


def options_of(overrides: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """Overrides as ``--set`` takes them.

    Args:
        overrides: Values by dotted path, ``{"training.max_steps": 20}``, or strings that are options already.

    Raises:
        RecipeError: A value is nothing that a recipe can hold.
    """
    if not isinstance(overrides, Mapping):
        return tuple(overrides)
    writer = _Writer()
    options = tuple(f"{key}={writer.inline(value, (key,))}" for key, value in overrides.items())
    writer.require()
    return options


def _written(fields: Mapping[str, Any], *, literal: bool = False) -> list[_Line]:
    """The lines of a recipe, each with the path of its field.

    Args:
        fields: What it holds.
        literal: Whether ``${`` in a string is text, as in a recipe whose variables are expanded.
    """
    writer = _Writer(literal=literal)
    lines = list(writer.block(fields, (), 0))
    writer.require()
    return lines or [("{}", ())]


class _Writer:
    """Python values to YAML, a field a line.

    Args:
        literal: Whether ``${`` in a string is text, not a variable.
    """

    def __init__(self, *, literal: bool = False) -> None:
        self.literal = literal
        self.mistakes: list[Mistake] = []

    def require(self) -> None:
        """Raise what was found wrong, if anything was."""
        if self.mistakes:
            raise fail(self.mistakes, Source("the recipe", ""))

    def block(self, fields: Mapping[Any, Any], path: KeyPath, depth: int) -> Iterator[_Line]:
        """The lines of a mapping's fields."""
        for key, value in fields.items():
            if not isinstance(key, str):
                self._refuse((*path, str(key)), f"the key {key!r} is a {type(key).__name__}: keys are strings")
                continue
            yield from self._field(f"{'  ' * depth}{self._key(key)}:", value, (*path, key), depth)

    def inline(self, value: Any, path: KeyPath) -> str:
        """A value on one line."""
        value = self._plain(value, path)
        if isinstance(value, Mapping):
            wrong = [key for key in value if not isinstance(key, str)]
            for key in wrong:
                self._refuse((*path, str(key)), f"the key {key!r} is a {type(key).__name__}: keys are strings")
            parts = [f"{self._key(k)}: {self.inline(v, (*path, k))}" for k, v in value.items() if k not in wrong]
            return f"{{{', '.join(parts)}}}"
        if isinstance(value, list):
            return f"[{', '.join(self.inline(item, (*path, index)) for index, item in enumerate(value))}]"
        return self._scalar(value, inside=len(path) > 1)

    def _field(self, head: str, value: Any, path: KeyPath, depth: int) -> Iterator[_Line]:
        value = self._plain(value, path)
        if isinstance(value, (Mapping, list)) and value:
            yield head, path
            if isinstance(value, Mapping):
                yield from self.block(value, path, depth + 1)
                return
            for index, item in enumerate(value):
                yield from self._field(f"{'  ' * (depth + 1)}-", item, (*path, index), depth + 1)
        elif isinstance(value, (Mapping, list)):
            yield f"{head} {'{}' if isinstance(value, Mapping) else '[]'}", path
        else:
            yield f"{head} {self._scalar(value)}", path

    def _plain(self, value: Any, path: KeyPath) -> Any:
        """A value as a recipe has it: numbers of other libraries are Python's, an object of the schema its fields."""
        if len(path) > MAX_DEPTH:  # it may hold itself
            self._refuse(path, f"a recipe cannot be nested deeper than {MAX_DEPTH} levels")
            return None
        if value is None or isinstance(value, (bool, str, Mapping)):
            return value
        if isinstance(value, numbers.Integral):
            return int(value)
        if isinstance(value, numbers.Real):
            return float(value)
        if isinstance(value, (list, tuple)):
            return list(value)
        if isinstance(value, BaseModel):
            given = [name for name in type(value).model_fields if name == "name" or name in value.model_fields_set]
            return {name: getattr(value, name) for name in given}
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        self._refuse(path, f"`{dotted(path)}` is a {type(value).__name__}, which no recipe can hold")
        return None

    def _key(self, key: str) -> str:
        return key if key != "<<" and is_plain_string(key) else _quoted(key)

    def _scalar(self, value: Any, *, inside: bool = False) -> str:
        if isinstance(value, str):
            text = str(value)
            if self.literal or isinstance(value, Expanded):
                text = text.replace("${", "$${")
            elif _VARIABLE.fullmatch(text) and not inside:
                return text
            return text if is_plain_string(text) else _quoted(text)
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else {"inf": ".inf", "-inf": "-.inf"}.get(repr(value), ".nan")
        return "null" if value is None else str(value).lower()

    def _refuse(self, path: KeyPath, message: str) -> None:
        text = f"{path[-1]}: ..."
        span = Span(Source(dotted(path), text, rank=len(self.mistakes) + 1), 0, 0, len(str(path[-1])))
        self.mistakes.append(Mistake(message, span))


def _quoted(text: str) -> str:
    """A string in double quotes, on one line."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))
