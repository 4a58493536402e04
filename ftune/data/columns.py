"""Rows under the names that formats know: ``data.train.columns`` applied to each row."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any

from ftune.data.decoding import Row
from ftune.data.sources import Changed, Rows
from ftune.data.turns import Misfit, kind_of, names
from ftune.errors import LocatedDataError
from ftune.recipe.columns import FORMATS, SPECS, Field, format_of, is_template, parse_template
from ftune.recipe.places import KeyPath
from ftune.recipe.schema import ColumnMap
from ftune.recipe.spelling import closest

__all__ = ["ABSENT", "Unfit", "renamed", "value_at", "written"]

NEEDED = {"prompt_completion": ("prompt", "completion"), "alpaca": ("instruction", "output")}
"""Fields that a format cannot do without, where a mapping gives one of its others."""
Make = Callable[[Row], Any]
LONGEST = 300
"""Digits of a number that is written out; a few characters could ask for a billion."""
MOST_CHARACTERS = 200_000_000
"""Of one row's text: a template may name one long column a thousand times."""
ABSENT = object()
"""What a row does not have; a null is something that it has."""


def renamed(rows: Rows, columns: ColumnMap, at: KeyPath, *, answers: bool = True) -> tuple[Rows, tuple[str, ...]]:
    """The rows with the mapping's names as columns, and the file's columns that went into them.

    A field that the mapping does not give is taken from the column of its own name, where the mapping's format has
    that field and the file that column.

    Args:
        rows: The rows as they were read.
        columns: What is what.
        at: Where the mapping stands in the recipe.
        answers: Whether the rows have to have answers; rows that are to be answered have none.

    Raises:
        LocatedDataError: A column is not in the file; says which are.
    """
    given = columns.given()
    makers: dict[str, Make] = {}
    used: list[str] = []
    problems: list[tuple[KeyPath, str, str | None]] = []
    for name, value in given.items():
        try:
            makers[name], taken = _maker(name, value, rows)
            used += taken
        except _Unknown as unknown:
            help = unknown.help
            if len(at) == 2:
                help += f"; the mapping is that of data.train: `{'.'.join(map(str, at))}.columns` replaces it"
            problems.append(((*at, name), unknown.message, help))
    if problems:
        raise LocatedDataError(problems)
    formats = format_of(set(given))
    fields = FORMATS[formats[0]] if formats else [name for own in FORMATS.values() for name in own]
    for name in (*fields, "system", "tools"):
        if name not in given and name in rows.columns and name not in used:
            makers[name] = _column(name)
            used.append(name)

    lacking = [name for name in NEEDED.get(formats[0], ()) if name not in makers] if formats and answers else []
    if lacking:
        said = f"`{lacking[0]}` is not given, and {rows.origin[0]} has no column of that name"
        raise LocatedDataError([(at, said, f"its columns are {names(rows.columns, '`')}")])

    def change(row: Row) -> Row:
        made: dict[str, Any] = {}
        for name, make in makers.items():
            try:
                value = make(row)
            except Misfit as misfit:
                return Unfit(str(misfit))
            if value is not ABSENT:
                made[name] = value
        return made

    digest = hashlib.sha256(f"{rows.fingerprint}\n{json.dumps(given, sort_keys=True)}".encode()).hexdigest()
    changed = replace(
        rows, source=Changed(rows.source, change), columns=tuple(makers), fingerprint=digest, named=dict(given)
    )
    return changed, tuple(dict.fromkeys(used))


class Unfit(dict[str, Any]):
    """A row that cannot be written as the mapping asks; ``why`` says it to whoever converts it."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why


class _Unknown(Exception):
    """A name that is no column."""

    def __init__(self, message: str, help: str) -> None:
        super().__init__(message)
        self.message, self.help = message, help


def _maker(name: str, value: str, rows: Rows) -> tuple[Make, list[str]]:
    """What makes one field of a row, and the columns that it needs."""
    if (head := _head(value, rows)) is not None:
        return _plain(name, value), [head]
    if is_template(value):
        parts = parse_template(value)
        heads = []
        for part in parts:
            if isinstance(part, Field):
                head = _head(part.name, rows)
                if head is None:
                    raise _unknown(part.name, rows, in_template=True)
                heads.append(head)
        return _filled(parts), heads
    if name == "system" and " " in value.strip() and closest(value, rows.columns) is None:
        return (lambda row: value), []
    raise _unknown(value, rows)


def _head(name: str, rows: Rows) -> str | None:
    """The column that a name or a path begins with; None where there is none, or no row has anything at the path."""
    if name in rows.columns:
        return name
    head = name.partition(".")[0]
    if "." not in name or head not in rows.columns or is_template(name):
        return None
    return head if any(value_at(row, name) is not ABSENT for _, row in rows) else None


def _unknown(name: str, rows: Rows, *, in_template: bool = False) -> _Unknown:
    near = closest(name, rows.columns)
    if near is not None:
        help = f"did you mean `{near}`? The columns are {names(rows.columns, '`')}"
    else:
        help = f"its columns are {names(rows.columns, '`')}"
        if rows.origin[0].lower().endswith((".csv", ".tsv")):
            help += ", named by its first line"
        if in_template and ":" in name:
            help += f"; behind a column may stand {SPECS}"
    return _Unknown(f"{rows.origin[0]} has no column `{name if len(name) <= 80 else name[:77] + '...'}`", help)


def value_at(row: Row, name: str) -> Any:
    """The value of a column, or at a path of keys and list indices inside one; ABSENT where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for key in name.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(value):
            value = value[int(key)]
        else:
            return ABSENT
    return value


def _column(name: str) -> Make:
    return lambda row: row.get(name, ABSENT)


def _plain(field: str, name: str) -> Make:
    """A column as a field: what is neither text nor a list of turns is written out."""

    def make(row: Row) -> Any:
        value = value_at(row, name)
        if value is ABSENT or value is None or isinstance(value, str | list | Mapping):
            return value
        return written(value, Field(name))

    return make


def _filled(parts: tuple[str | Field, ...]) -> Make:
    """A template's text for a row; what is null, or missing in this row, is empty."""

    def make(row: Row) -> str:
        texts: list[str] = []
        length = 0
        for part in parts:
            if isinstance(part, str):
                texts.append(part)
            else:
                value = value_at(row, part.name)
                texts.append(written(None if value is ABSENT else value, part))
            length += len(texts[-1])
            if length > MOST_CHARACTERS:
                raise Misfit(f"the text with its columns has more than {MOST_CHARACTERS:,} characters")
        return "".join(texts)

    return make


def written(value: Any, field: Field) -> str:
    """A value as text: null is empty, numbers, booleans, lists and objects are as JSON has them.

    Raises:
        Misfit: The value is no number where one is asked for, or could be written in two ways.
    """
    spec = field.spec
    if isinstance(value, float) and math.isnan(value):
        value = None
    if spec == "json":
        return _json(value, field)
    if value is None:
        return ""
    if spec is not None:
        return _number(value, field)
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        # a table keeps whole numbers as floats once one of them is missing
        raise Misfit(
            f"`{field.name}`: found {value!r}, which may stand for {value:.0f}: write `{{{field.name}:d}}` in a "
            f"template for a whole number, or `{{{field.name}:.1f}}`"
        )
    if isinstance(value, bytes):
        raise Misfit(f"`{field.name}`: found bytes, which are no text")
    if isinstance(value, bool | int | float | list | dict):
        return _json(value, field)
    return str(value)  # dates and decimal numbers of tables


def _json(value: Any, field: Field) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        raise Misfit(f"`{field.name}`: found a {type(value).__name__} nested too deeply to be written") from None


def _number(value: Any, field: Field) -> str:
    spec = field.spec or ""
    try:
        if isinstance(value, bool):
            raise InvalidOperation
        number = Decimal(str(value).strip())
        if (
            not number.is_finite()
            or abs(number.adjusted()) > LONGEST
            or (spec == "d" and number != number.to_integral_value())
        ):
            raise InvalidOperation
        return str(int(number)) if spec == "d" else format(number, spec)
    except (InvalidOperation, ValueError):
        wanted = "a whole number" if spec == "d" else "a number"
        raise Misfit(f"`{field.name}`: found {kind_of(value)}; `{{{field.name}:{spec}}}` takes {wanted}") from None
