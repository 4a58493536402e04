"""Mistakes in a recipe as a compiler would report them: where, what, and how to mend it.

Three steps: a ``Mistake`` says what is wrong and at which ``Span`` of which ``Source``; ``translate`` turns
pydantic's errors and the checks' ``Problem``s into mistakes; ``render`` turns a mistake into text::

    error: unknown field `rnak` for method `lora`
      --> recipes/lora.yaml:7:3
    7 |   rnak: 16
      |   ^^^^ did you mean `rank`?
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from ftune.methods import METHODS, Problem
from ftune.methods.quantization import Quantization
from ftune.recipe.other_tools import other_value
from ftune.recipe.places import KeyPath, Mistake, Positions, dotted
from ftune.recipe.schema import SHORT_FORMS
from ftune.recipe.spelling import closest
from ftune.recipe.suggestions import either, model_at, suggest_field, ticked
from ftune.scrub import scrub

__all__ = [
    "error_paths",
    "from_problems",
    "translate",
]


# --- words ---


def _shown(value: object) -> str:
    """A value in the words of a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        value = scrub(value)  # before it is cut: half of a token is still a secret
        return f'the string "{value if len(value) <= 40 else value[:39] + chr(0x2026)}"'
    if isinstance(value, Mapping):
        return "a block of fields"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"{value}"


# --- pydantic's errors ---


@dataclass(frozen=True)
class _Entry:
    """One pydantic error with its location cleaned of union tags."""

    path: KeyPath
    kind: str
    value: Any
    context: Mapping[str, Any]
    message: str
    branch: bool


def _clean(loc: KeyPath, raw: Any) -> tuple[KeyPath, bool]:
    """Drop what pydantic adds to a location: the method's tag and the names of union branches.

    Returns the path, and whether a union branch was dropped.
    """
    path: list[str | int] = []
    value, branch = raw, False
    for index, key in enumerate(loc):
        if path == ["method"] and index == 1 and key in METHODS:
            continue
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, (list, tuple)) and isinstance(key, int) and key < len(value):
            value = value[key]
        elif index < len(loc) - 1 or not _is_field(tuple(path), key, raw):
            branch = True
            continue
        path.append(key)
    return tuple(path), branch


def _is_field(parent: KeyPath, key: str | int, raw: Any) -> bool:
    model = model_at(parent, raw)
    return model is not None and key in model.model_fields


def _is_required(path: KeyPath, raw: Any) -> bool:
    model = model_at(path[:-1], raw)
    info = model.model_fields.get(str(path[-1])) if model else None
    return info is None or info.is_required()


def translate(error: ValidationError, raw: Any, positions: Positions) -> list[Mistake]:
    """Pydantic's errors as mistakes, one for each wrong value.

    Args:
        error: What validating ``raw`` raised.
        raw: The recipe as plain data, short forms expanded.
        positions: Where its fields are written.
    """
    entries = []
    for item in error.errors(include_url=False):
        path, branch = _clean(item["loc"], raw)
        kind = item["type"]
        if kind == "missing" and isinstance(item["loc"][-1], int):
            kind = "too_few"
        entries.append(_Entry(path, kind, item["input"], item.get("ctx") or {}, item["msg"], branch))
    by_path: dict[KeyPath, list[_Entry]] = {}
    for entry in entries:
        # The branch of a union that the user did not mean says nothing where another one got further.
        if entry.branch and any(_below(other.path, entry.path) for other in entries):
            continue
        by_path.setdefault(entry.path, []).append(entry)
    return [_mistake(path, group, raw, positions) for path, group in by_path.items()]


def error_paths(error: ValidationError, raw: Any) -> list[KeyPath]:
    """Where in ``raw`` pydantic found something wrong."""
    return [_clean(item["loc"], raw)[0] for item in error.errors(include_url=False)]


def _below(path: KeyPath, above: KeyPath) -> bool:
    return len(path) > len(above) and path[: len(above)] == above


def _mistake(path: KeyPath, group: list[_Entry], raw: Any, positions: Positions) -> Mistake:
    """One mistake out of all errors that pydantic has about one value."""
    first = group[0]
    if first.kind == "missing":
        return _missing(path, raw, positions)
    if first.kind == "extra_forbidden":
        return _unknown(path, raw, positions)
    if first.kind in ("union_tag_invalid", "union_tag_not_found"):
        return _method_name(path, first, positions)
    if all(entry.kind in _EXPECTED or entry.kind == "literal_error" for entry in group):
        return _wrong_type(path, group, raw, positions)
    limit = next(entry for entry in group if entry.kind not in _EXPECTED)
    return _at(path, positions, f"`{dotted(path)}` {_limit(limit)}")


def _at(path: KeyPath, positions: Positions, message: str, label: str = "", help: str | None = None) -> Mistake:
    """A mistake about a value; shown at its key when the value is a block or is not written at all."""
    found = positions.nearest(path)
    if found is None:
        return Mistake(message, None, help=help or label or None)
    where, position = found
    at_key = position.block or where != path
    return Mistake(message, position.key if at_key else position.value, label, help)


def _missing(path: KeyPath, raw: Any, positions: Positions) -> Mistake:
    name, parent = path[-1], path[:-1]
    if not parent:
        example = {
            "model": "model: HuggingFaceTB/SmolLM2-135M-Instruct",
            "method": "method: lora",
            "data": "data: data/train.jsonl",
            "output_dir": "output_dir: runs/first",
        }.get(str(name), f"{name}: ...")
        return Mistake(f"the recipe has no `{name}`", None, "", f"add `{example}`")
    return _at(path, positions, f"`{dotted(parent)}` has no `{name}`", f"add `{name}` to it")


def _unknown(path: KeyPath, raw: Any, positions: Positions) -> Mistake:
    parent = path[:-1]
    if parent == ("method",):
        where = f"for method `{raw['method']['name']}`"
    else:
        where = f"in `{dotted(parent)}`" if parent else "in the recipe"
    label, help = suggest_field(path, raw)
    found = positions.nearest(path)
    return Mistake(f"unknown field `{path[-1]}` {where}", found[1].key if found else None, label, help)


def _method_name(path: KeyPath, entry: _Entry, positions: Positions) -> Mistake:
    help = f"methods: {', '.join(METHODS)}"
    name = entry.value.get("name") if isinstance(entry.value, Mapping) else None
    path = (*path, "name")
    if entry.kind == "union_tag_not_found" and name is None:
        if path in positions.at:
            return _at(path, positions, "`method.name` must be a method's name, not null", "", help)
        return _at(path, positions, "`method` has no `name`", "add `name` to it", help)
    if not isinstance(name, str):
        return _at(path, positions, f"`method.name` must be a method's name, not {_shown(name)}", "", help)
    known = other_value("method.name", name)
    near = closest(name, METHODS) if known is None else known
    return _at(
        path,
        positions,
        f"unknown method `{name}`",
        f"did you mean `{near}`?" if near else "",
        None if near else help,
    )


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a block of fields",
    "model_type": "a block of fields",
    "model_attributes_type": "a block of fields",
}


def _wrong_type(path: KeyPath, group: list[_Entry], raw: Any, positions: Positions) -> Mistake:
    """A value of the wrong kind, or outside a list of allowed values."""
    value = group[0].value
    name = dotted(path)
    words: list[str] = []
    allowed: list[str] = []
    for entry in group:
        if entry.kind == "literal_error":
            allowed += re.findall(r"'([^']*)'", str(entry.context["expected"])) or [str(entry.context["expected"])]
        else:
            words.append(_EXPECTED[entry.kind])
    short = SHORT_FORMS.get(tuple("*" if isinstance(key, int) else key for key in path))
    if "a block of fields" in words and short:
        words.insert(0, "a string")
    words = [part for word in dict.fromkeys(words) for part in word.split(" or ")]
    known = other_value(name, value) if isinstance(value, str) else None
    near = known if known in allowed or known == "" else closest(value, allowed) if isinstance(value, str) else None
    label = f"did you mean `{near}`?" if near else _conversion(value, words)
    if value is None and not _is_required(path, raw):
        label = "remove it to get the default"
    help = None
    if path in (("data", "train"), ("data", "eval")) and isinstance(value, (list, tuple)):
        label, help = "", "one source is taken: put the files into one directory, or their rows into one file"
    if path == ("method", "quantization") and "a block of fields" in words:
        label = label or _as_quantization(value, raw)
    if allowed and not words:
        if isinstance(value, str):
            help = None if near and len(allowed) > 4 else f"one of {ticked(allowed)}"
            return _at(path, positions, f"`{name}` cannot be `{value}`", label, help)
        words = [f"`{word}`" for word in allowed]
        return _at(path, positions, f"`{name}` must be {either(words)}, not {_shown(value)}", label)
    words += [f"`{word}`" for word in allowed]
    return _at(path, positions, f"`{name}` must be {either(words)}, not {_shown(value)}", label, help)


def _as_quantization(value: object, raw: Any) -> str:
    """How to write the ``quantization`` block that a switch or a type's name stands for."""
    if value is False:
        return "remove it" if METHODS[raw["method"]["name"]].model_fields["quantization"].default is None else ""
    info = Quantization.model_fields["type"]
    return f"write {{type: {closest(value, get_args(info.annotation)) or info.default}}}"


_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def _conversion(value: object, words: Sequence[str]) -> str:
    """How to write a value so that it gets the type that was expected, where that can be guessed."""
    number = "a number" in words or "a whole number" in words
    if isinstance(value, str):
        folded = value.strip().lower()
        folded = _BOOLEANS.get(folded, folded)
        if "true" in words and folded in ("true", "false"):
            return f"write {folded}"
        if number:
            return _number_in(value)
        if "a list" in words:
            return f"write [{value}]"
        if "a block of fields" in words and re.fullmatch(r"\w+:\S+", value):
            return "put a space after the colon"
        return ""
    if isinstance(value, float) and "a whole number" in words and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, (bool, int, float)) and "a string" in words:
        return "write it in quotes"
    if isinstance(value, Mapping) and "a string" in words and len(value) == 1 and None in value.values():
        return f'write it in quotes: "{{{next(iter(value))}}}"'  # braces that were meant as text
    if isinstance(value, (list, tuple)) and len(value) == 1 and not isinstance(value[0], (list, dict, tuple)):
        return "write it without the brackets"
    return ""


def _number_in(text: str) -> str:
    """What to say of a string where a number belongs."""
    plain = text.strip().replace("_", "").replace(",", "")
    if not re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", plain) or len(plain) > 40:
        return ""
    return "remove the quotes" if plain == text else f"write {plain}"


def _limit(entry: _Entry) -> str:
    """What a value breaks when its type is right."""
    context = entry.context
    shown = _shown(entry.value)
    match entry.kind:
        case "greater_than":
            return f"must be greater than {context['gt']:g}, not {shown}"
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}, not {shown}"
        case "less_than":
            return f"must be less than {_limit_number(context['lt'])}, not {shown}"
        case "less_than_equal":
            return f"must be at most {_limit_number(context['le'])}, not {shown}"
        case "multiple_of":
            return f"must be a multiple of {context['multiple_of']:g}, not {shown}"
        case "string_too_short":
            return "must not be empty"
        case "too_few":
            return "has too few entries"
        case "too_short" | "too_long":
            length = context.get("min_length", context.get("max_length"))
            return f"must have {length} entries, not {context['actual_length']}"
        case "value_error" | "assertion_error":
            return f"is wrong: {context.get('error', entry.message)}"
        case "finite_number":
            return "must be finite"
        case _:
            return f"is wrong: {entry.message[:1].lower()}{entry.message[1:]}"


def _limit_number(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


# --- problems of a recipe that parses ---


def from_problems(problems: Iterable[Problem], positions: Positions) -> list[Mistake]:
    """The findings of ``ftune.recipe.checks`` as mistakes with a position."""
    found = []
    for problem in problems:
        suggests = (problem.help or "").startswith("did you mean")
        label, help = (problem.help or "", None) if suggests else ("", problem.help)
        found.append(_at(tuple(problem.loc), positions, problem.message, label, help))
    return found
