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
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from ftune.errors import RecipeError
from ftune.methods import METHODS, Problem
from ftune.methods.quantization import Quantization
from ftune.recipe.other_tools import ELSEWHERE, GENERIC, HERE, NO_FIELD, NOTES, other_value
from ftune.recipe.schema import SHORT_FORMS, ColumnMap, Recipe
from ftune.recipe.spelling import closest
from ftune.scrub import scrub

__all__ = [
    "KeyPath",
    "Mistake",
    "Position",
    "Positions",
    "Source",
    "Span",
    "dotted",
    "error_paths",
    "fail",
    "from_problems",
    "models_in",
    "render",
    "translate",
]

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the recipe's root."""

MAX_REPORTS = 50
"""More mistakes than this are counted, not shown."""

TAB = 4
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


# --- where ---


@dataclass(frozen=True)
class Source:
    """Text that a mistake can be in: a recipe file, or one ``--set`` option.

    Attributes:
        name: The file as the user named it, or ``command line``.
        text: All of it.
        rank: Order among sources in a report: 0 for the file, then the options as given.
    """

    name: str
    text: str
    rank: int = 0

    @cached_property
    def lines(self) -> list[str]:
        """The lines as YAML counts them."""
        return _LINE_BREAK.split(self.text)


@dataclass(frozen=True)
class Span:
    """A stretch of one line; ``line`` and ``column`` count characters from 0."""

    source: Source
    line: int
    column: int
    length: int = 1

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts spans by source, line and column."""
        return (self.source.rank, self.line, self.column)


@dataclass(frozen=True)
class Position:
    """Where one field is written.

    Attributes:
        key: Its key, or its value when it has no key (list entries, short forms).
        value: Its value; the first line of it when there are several.
        block: Whether the value is a collection: a mistake about all of it is shown at the key.
    """

    key: Span
    value: Span
    block: bool = False


@dataclass
class Positions:
    """Where each field of a recipe is written, by its path."""

    source: Source
    at: dict[KeyPath, Position] = field(default_factory=dict)

    def nearest(self, path: KeyPath) -> tuple[KeyPath, Position] | None:
        """The position of a field, else of the closest block around it that is written."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.at:
                return path[:end], self.at[path[:end]]
        return None

    def forget(self, path: KeyPath) -> None:
        """Drop a field and everything under it."""
        for known in [known for known in self.at if known[: len(path)] == path]:
            del self.at[known]


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong.

    Attributes:
        message: What, in one line without a full stop.
        span: Where; None when it is about the whole source.
        label: How to mend it, in a few words behind the caret.
        help: How to mend it, in a sentence of its own.
        also: An earlier place that matters, with a label (the first of two equal keys).
    """

    message: str
    span: Span | None = None
    label: str = ""
    help: str | None = None
    also: tuple[Span, str] | None = None


# --- rendering ---

_RED, _YELLOW, _BLUE, _BOLD, _RESET = "\x1b[1;31m", "\x1b[1;33m", "\x1b[1;34m", "\x1b[1m", "\x1b[0m"


def render(
    mistake: Mistake,
    source: Source,
    *,
    level: Literal["error", "warning"] = "error",
    color: bool = False,
    width: int | None = None,
) -> str:
    """One report, without a newline at its end.

    Args:
        mistake: What to report.
        source: What it is about when it has no position of its own.
        level: The first word.
        color: Use ANSI colours.
        width: Columns of the terminal, to which source lines are trimmed. Default: this terminal's.
    """
    if width is None:
        from shutil import get_terminal_size

        width = get_terminal_size((100, 24)).columns
    hue = _RED if level == "error" else _YELLOW

    def paint(text: str, code: str) -> str:
        return f"{code}{text}{_RESET}" if color else text

    out = [paint(level, hue) + paint(f": {printable(mistake.message)}", _BOLD)]
    span, late = mistake.span, ""
    if span is None:
        out.append(f"  {paint('-->', _BLUE)} {printable(source.name)}")
    else:
        of_file = span.source.rank == 0
        where = f"{span.source.name}:{span.line + 1}:{span.column + 1}" if of_file else span.source.name
        out.append(f"  {paint('-->', _BLUE)} {printable(where)}")
        shown = [(mistake.also[0], mistake.also[1], "-")] if mistake.also else []
        shown.append((span, mistake.label, "^"))
        digits = max(len(str(part.line + 1)) for part, _, _ in shown)
        for index, (part, label, mark) in enumerate(shown):
            number = str(part.line + 1) if part.source.rank == 0 else ""
            if index and part.line > shown[index - 1][0].line + 1:
                out.append("...")
            line, column, cells = _window(part, max(width - digits - 3, 40))
            gutter = paint(f"{number:>{digits}} |", _BLUE)
            out.append(f"{gutter} {line}".rstrip())
            label = printable(label)
            if label and digits + 3 + column + cells + 1 + _cells(label) > max(width, 60):
                late, label = label, ""
            gutter = paint(f"{'':>{digits}} |", _BLUE)
            out.append(f"{gutter} {' ' * column}{paint(mark * cells, hue)} {paint(label, hue)}".rstrip(" "))
            if color and not label:
                out[-1] = f"{gutter} {' ' * column}{paint(mark * cells, hue)}"
    for text in (late, mistake.help):
        if text:
            out.append(f"  {paint('help:', _BLUE)} {printable(text)}")
    return "\n".join(out)


def fail(mistakes: Sequence[Mistake], source: Source, *, color: bool = False) -> RecipeError:
    """Every mistake, sorted by position, as the exception to raise."""
    ordered = sorted(dict.fromkeys(mistakes), key=lambda m: m.span.order if m.span else (-1, 0, 0))
    reports = [render(mistake, source, color=color) for mistake in ordered[:MAX_REPORTS]]
    if len(ordered) > MAX_REPORTS:
        reports.append(f"error: {len(ordered) - MAX_REPORTS} more mistakes are not shown")
    return RecipeError(reports)


def printable(text: str) -> str:
    """The text with control characters replaced: a recipe must not steer the terminal, nor flood it."""
    if len(text) > 1:  # source lines come scrubbed, character by character
        text = scrub(text)
    if len(text) > 1000:
        text = f"{text[:500]}\u2026{text[-100:]}"
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def _cell(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(map(_cell, text))


def _window(span: Span, width: int) -> tuple[str, int, int]:
    """The part of a line to show: its text, and column and width of the caret, in terminal cells."""
    line = scrub(span.source.lines[span.line]) if span.line < len(span.source.lines) else ""
    # What is farther from the caret than a whole screen cannot be shown: lines may be very long.
    skipped = max(span.column - 2 * width, 0)
    length = min(span.length, width)
    pieces: list[str] = []
    edges = [0]  # cells before each piece
    for character in line[skipped : span.column + length + 2 * width]:
        # Tab stops are relative to the line's own start, so that carets stay below what they mark.
        piece = " " * (TAB - edges[-1] % TAB) if character == "\t" else printable(character)
        pieces.append(piece)
        edges.append(edges[-1] + _cells(piece))
    first = min(span.column - skipped, len(pieces))
    last = min(first + length, len(pieces))
    cells = max(edges[last] - edges[first], 1)
    if not skipped and edges[-1] <= width:
        return "".join(pieces), edges[first], cells
    # Keep the caret in the left half: labels stand to its right.
    cells = min(cells, width // 2)
    lead = max(width // 2 - cells, 8)
    start = next(index for index in range(first + 1) if edges[first] - edges[index] <= lead)
    text = "\u2026" if start or skipped else ""
    column = edges[first] - edges[start] + len(text)
    stop = len(pieces)
    if edges[stop] - edges[start] + len(text) > width:
        stop = max(i for i in range(start, stop) if edges[i] - edges[start] + len(text) <= width - 1)
    return text + "".join(pieces[start:stop]) + ("\u2026" if stop < len(pieces) else ""), column, cells


# --- words ---


def dotted(path: Iterable[str | int]) -> str:
    """A path as ``--set`` takes it: ``evaluation.metrics.0.name``."""
    return ".".join(map(str, path))


def _ticked(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


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


# --- what the schema knows ---


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


def _suggest_field(path: KeyPath, raw: Any) -> tuple[str, str | None]:
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
    if block.endswith(".columns") and (meant := _value_at(path, raw)) in siblings:
        return f"write `{meant}: {name}`", None
    elsewhere = local or ELSEWHERE.get(name, "")
    if len(parent) == 2 and parent[0] == "data" and name in ColumnMap.model_fields:
        elsewhere = f"{block}.columns.{name}"
    if elsewhere and elsewhere != dotted(path) and _exists(elsewhere, raw):
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
        return f"`{word}` belongs to {_either([f'`{home}`' for home in homes])}", None
    if near := closest(word, siblings, 0 if name in GENERIC else 3):
        return f"did you mean `{near}`?", None
    far = {field: f"{home}.{field}" for home, model in blocks.items() for field in model.model_fields}
    # a name that several blocks have says nothing of which was meant
    far = {field: home for field, home in far.items() if field != name}
    far |= {field: field for field in Recipe.model_fields}
    if near := closest(word, far, 0 if name in GENERIC else 2):
        return f"did you mean `{far[near]}`?", None
    if meant := _required_instead(parent, raw):
        return f"did you mean `{meant}`?", None
    where = "the recipe" if not parent else f"`{dotted(parent)}`"
    return "", f"fields of {where}: {', '.join(siblings)}" if siblings else None


def _value_at(path: KeyPath, raw: Any) -> Any:
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
        return "", f"`{method}` needs unquantized base weights: remove it, or use {_either(able)}"
    owners = [f"`{other}`" for other, cls in METHODS.items() if name in cls.model_fields]
    if not owners:
        return None
    return f"{'' if name == word else f'`{name}`, '}a field of {_either(owners)}", None


def _required_instead(block: KeyPath, raw: Any) -> str | None:
    """The one required field that a block lacks, where one key that it does not know stands in it instead."""
    model, written = model_at(block, raw), raw
    for key in block:
        written = written[key]
    if not block or model is None:
        return None
    lacking = [name for name, info in model.model_fields.items() if info.is_required() and name not in written]
    unknown = [key for key in written if key not in model.model_fields]
    return lacking[0] if len(lacking) == len(unknown) == 1 else None


def _exists(path: str, raw: Any) -> bool:
    """Whether a dotted field exists for the method that the recipe names."""
    *parent, name = path.split(".")
    model = model_at(tuple(parent), raw)
    return model is not None and name in model.model_fields


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
    label, help = _suggest_field(path, raw)
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
            help = None if near and len(allowed) > 4 else f"one of {_ticked(allowed)}"
            return _at(path, positions, f"`{name}` cannot be `{value}`", label, help)
        words = [f"`{word}`" for word in allowed]
        return _at(path, positions, f"`{name}` must be {_either(words)}, not {_shown(value)}", label)
    words += [f"`{word}`" for word in allowed]
    return _at(path, positions, f"`{name}` must be {_either(words)}, not {_shown(value)}", label, help)


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
