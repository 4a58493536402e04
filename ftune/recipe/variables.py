"""Variables of the environment in a recipe: ``${NAME}`` and ``${NAME:-default}``; ``$${`` for the characters ``${``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftune.recipe.spelling import closest

__all__ = ["Expanded", "Unexpanded", "expand_variables", "frozen", "unbraced"]

_PART = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}]*))?\}|\$\{")
_UNBRACED = re.compile(r"(?:^|/)(\$([A-Za-z_][A-Za-z0-9_]*))(?=/|$)")
_ESCAPE = "`$${` stands for the characters `${`"


class Expanded(str):
    """A string that variables were put into.

    Attributes:
        typed: What YAML makes of it where it is written without quotes: a number, a boolean or null.
    """

    typed: Any

    def __new__(cls, text: str, typed: Any) -> Expanded:
        """A string with its other reading beside it."""
        made = super().__new__(cls, text)
        made.typed = typed
        return made

    def __getnewargs__(self) -> tuple[str, Any]:  # type: ignore[override]
        """What a copy is made from: recipes are sent to other processes."""
        return str(self), self.typed


@dataclass(frozen=True)
class Unexpanded:
    """A variable that cannot be put in.

    Attributes:
        part: The characters of the recipe that ask for it.
        message: What is wrong.
        help: What to write instead.
    """

    part: str
    message: str
    help: str


def expand_variables(text: str, environment: Mapping[str, str] = os.environ) -> tuple[str, list[Unexpanded]]:
    """A text with the values of its variables, and what could not be put in.

    A default stands in where the variable is not set, or is empty, as in a shell. Values are put in as they are: a
    ``${`` in one is no variable.
    """
    wrong: list[Unexpanded] = []

    def put(match: re.Match[str]) -> str:
        whole, name, default = match[0], match["name"], match["default"]
        if whole == "$${":
            return "${"
        if name is None:
            end = text.find("}", match.start())
            part = text[match.start() : end + 1] if end >= 0 else whole
            wrong.append(
                Unexpanded(part, f"`{part}` is no variable", f"write ${{NAME}} or ${{NAME:-default}}; {_ESCAPE}")
            )
            return whole
        value = environment.get(name, "")
        if not value and default is not None:
            return str(default)
        if name not in environment:
            near = closest(name, sorted(environment))
            hint = f"did you mean `{near}`? Else set it" if near else "set it"
            wrong.append(
                Unexpanded(
                    whole,
                    f"the environment variable `{name}` is not set",
                    f"{hint}, or write `${{{name}:-default}}`; {_ESCAPE}",
                )
            )
            return whole
        if "\0" in value or not value.isascii() and not _is_utf8(value):
            wrong.append(Unexpanded(whole, f"the environment variable `{name}` is not UTF-8 text", "set it anew"))
            return whole
        return value

    return _PART.sub(put, text), wrong


def unbraced(path: str) -> str | None:
    """The name of a variable that is written without braces as a part of a path, which is not expanded; else None."""
    found = _UNBRACED.search(path)
    return found[2] if found else None


def frozen(value: Any) -> Any:
    """Plain data as the schemas have it: sequences are tuples, and what variables were put into is a string."""
    if isinstance(value, Expanded):
        return str(value)
    if isinstance(value, dict):
        return {key: frozen(inner) for key, inner in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def _is_utf8(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
