"""Templates for columns: ``"Ticket: {ticket_text} Team:"``, the values of a row's columns set into a text.

Not ``str.format``: a field names a column, or a place inside one (``answers.text.0``), and reaches nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["FORMATS", "SPECS", "Field", "format_of", "is_template", "parse_template"]

SPECS = "`{x:d}` (a whole number), `{x:.2f}` (so many places), `{x:json}` (as JSON)"
"""What may follow a column's name in a template, in words."""
_FIELD = re.compile(r"(?P<name>.+):(?P<spec>d|json|,|,?\.\d{1,2}[fe%]|\.\d{1,2}g)", re.DOTALL)

FORMATS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output", "history"),
    "text": ("text",),
}
"""The fields of ``columns`` that belong to one format; ``system`` and ``tools`` go with several."""


@dataclass(frozen=True)
class Field:
    """A place in a template where a value stands.

    Attributes:
        name: A column, or a path into one.
        spec: How the value is written; None: as it is.
    """

    name: str
    spec: str | None = None


def is_template(text: str) -> bool:
    """Whether a text must be read as a template."""
    return "{" in text or "}" in text


def parse_template(text: str) -> tuple[str | Field, ...]:
    """The texts and fields of a template, in order; ``{{`` and ``}}`` stand for braces.

    Raises:
        ValueError: Braces do not match, or a field is empty; says how to mend it.
    """
    parts: list[str | Field] = []
    plain, position = "", 0
    while position < len(text):
        character = text[position]
        if text[position : position + 2] in ("{{", "}}"):
            plain, position = plain + character, position + 2
            continue
        if character == "}":
            raise ValueError("a `}` without a `{`: write }} for a brace that is text")
        if character != "{":
            plain, position = plain + character, position + 1
            continue
        end = text.find("}", position)
        inner = text[position + 1 : end]
        if end < 0 or "{" in inner:
            raise ValueError("a `{` without a `}`: write {{ and }} for braces that are text")
        if not inner.strip():
            raise ValueError("an empty field: name a column between { and }, or write {{}} for braces that are text")
        found = _FIELD.fullmatch(inner)
        if plain:
            parts.append(plain)
        parts.append(Field(found["name"], found["spec"]) if found else Field(inner))
        plain, position = "", end + 1
    return (*parts, plain) if plain else tuple(parts)


def format_of(fields: set[str]) -> list[str]:
    """The formats that some fields of ``columns`` speak for; several contradict each other."""
    return [name for name, own in FORMATS.items() if fields & set(own)]
