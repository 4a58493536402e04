"""Columns that a format does not use: told, or refused where they look like something to be learned.

A column that is left over is refused under ``format: auto``, unless its name says that it is about the row and not in
it (``id``, ``source``, ``url``, ``metadata``, ... ), or it only repeats what is used. With a format or with columns
that the recipe names it is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ftune.data.sources import Rows
from ftune.data.turns import CHAT_COLUMNS, ROLES, names
from ftune.errors import DataError

__all__ = ["block_to_copy", "of_pairs", "proposal", "unused_columns"]

_ABOUT_THE_ROW = frozenset(
    "id idx index row uid uuid guid hash sha256 md5 url uri link source origin dataset dataset_name subset split file "
    "filename file_name path date time timestamp license licence meta metadata".split()
)
"""Names of columns that say where a row is from, and nothing that could be learned."""
_ABOUT_THE_ROW_ENDS = ("_id", "_ids", "_idx", "_index", "_url", "_hash", "_at")

_TRUTHS = ("true", "false")

HUB_ROWS = 20_000
"""Rows of a hub data set that are looked through: each is decoded for it, those of files are in memory."""

# what people call the parts of an example, the likeliest first
_ANSWERS = (
    "completion",
    "answer",
    "answers",
    "response",
    "output",
    "target",
    "label",
    "labels",
    "reply",
    "summary",
    "translation",
    "chosen",
    "preferred_output",
    "category",
    "class",
    "sentiment",
    "intent",
    "code",
    "sql",
)
_SYSTEMS = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
_HISTORIES = ("history",)
# the other answer of a pair for preference training, which is no part of an example
_NOT_PREFERRED = ("rejected", "rejected_response", "non_preferred_output")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


@dataclass
class Unused:
    """Where a column that nothing takes holds something.

    Attributes:
        count: Rows in which it does.
        first: The number of the first of them.
    """

    count: int = 0
    first: int = 0


def unused_columns(rows: Rows, used: Sequence[str]) -> dict[str, Unused]:
    """The columns that nothing takes and that hold something.

    Left out are those that repeat what is used in every row.

    Args:
        rows: The rows as they were read.
        used: The columns that are taken.
    """
    left = [name for name in rows.columns if name not in used]
    if not left:
        return {}
    found = {name: Unused() for name in left}
    repeats = set(left)
    for number, row in islice(rows, _looked_through(rows)):
        for name in left:
            if not _is_empty(row.get(name)):
                found[name].first = number if not found[name].count else found[name].first
                found[name].count += 1
        taken = [text for name in used for text in _texts(row.get(name))] if repeats else []
        repeats = {name for name in repeats if _is_empty(row.get(name)) or _repeats(row.get(name), taken)}
    return {name: unused for name, unused in found.items() if unused.count and name not in repeats}


def empty_note(rows: Rows, columns: Sequence[str], key: str) -> list[str]:
    """What to tell of values that stand in a text and are empty, or missing, in some rows."""
    empty = dict.fromkeys(columns, 0)
    for _, row in islice(rows, _looked_through(rows)):
        for name in columns:
            empty[name] += _is_empty(row.get(name))
    of = _looked_through(rows)
    shown = [f"`{name[:40]}` in {count:,} of {of:,} rows" for name, count in empty.items() if count]
    return [f"data.{key}: empty in the text: {', '.join(shown)}"] if shown else []


def _looked_through(rows: Rows) -> int:
    return len(rows) if isinstance(rows.source, list) else min(len(rows), HUB_ROWS)


def is_about_the_row(name: str) -> bool:
    """Whether a column's name says that it is not content."""
    lower = name.strip().lower()
    # pandas writes its index as a column without a name, or reads it as `Unnamed: 0`
    counted = lower == "" or lower.startswith(("_", "unnamed: "))
    return counted or lower in _ABOUT_THE_ROW or lower.endswith(_ABOUT_THE_ROW_ENDS)


def note(unused: Mapping[str, Unused], rows: Rows, key: str) -> list[str]:
    """What to tell of unused columns; nothing where there are none."""
    if not unused:
        return []
    of = _looked_through(rows)
    cut = "first " if of < len(rows) else ""
    shown = [
        f"`{name[:40]}`" if one.count == of else f"`{name[:40]}` (in {one.count:,} of the {cut}{of:,} rows)"
        for name, one in list(unused.items())[:20]
        if name  # pandas' index has none
    ]
    if not shown:
        return []
    more = [f"{len(unused) - 20} more"] if len(unused) > 20 else []
    return [f"data.{key}: not used: {', '.join([*shown, *more])}"]


def refusal(
    unused: Mapping[str, Unused], rows: Rows, format: str, used: Sequence[str], key: str, path: str
) -> DataError:
    """The error for columns that may be what was meant to be learned."""
    several = len(unused) > 1
    taken = names([name for name in used if name in rows.columns], "`")
    columns = proposal(rows)
    _, row = next(iter(rows))
    judged = [n for n in unused if format != "text" and n.lower() == "label" and str(row.get(n)).lower() in _TRUTHS]
    media = [name for name in unused if name.lower() in _MEDIA]
    without = f"write `format: {format}` there"
    alone = without.replace("there", f"in `data.{key}`")
    if judged:
        help = f"`{judged[0]}` says which answers are good: leave out the rows where it is false, then {alone}"
    elif media:
        help = f"ftune trains on text only: leave out the rows with {names(media, '`')}, or {alone}"
    elif any(name in value for name in unused for value in columns.values()):
        help = (
            f"{of_pairs(rows)}say in the recipe what the columns are for, for example\n"
            f"{block_to_copy(columns, key, path)}\n  or {without} instead of `columns`"
        )
    else:
        help = f"{of_pairs(rows)}{alone}"
    sparse = next((one for one in unused.values() if one.count < len(rows)), None)
    first = f" (first at {rows.where(sparse.first)})" if sparse else ""
    which = f"the column{'s' if several else ''} {names(list(unused), '`')}"
    return DataError(
        f"{rows.origin[0]}: {which} would not be used{first}: format `{format}`, which was detected, takes {taken}",
        help=f"{help}, to go on without {'them' if several else 'it'}",
    )


def proposal(rows: Rows) -> dict[str, str]:
    """What the columns of a file are, by their names: an example to change."""
    columns = [name for name in rows.columns if not is_about_the_row(name)] or list(rows.columns)
    _, first = next(iter(rows))
    found: dict[str, str] = {}
    for field, known in (("system", _SYSTEMS), ("tools", _TOOLS), ("history", _HISTORIES)):
        name = next((name for name in columns if name.lower() in known), None)
        if name is not None:
            found[field] = name
    content = [name for name in columns if name not in found.values()]
    content = [name for name in content if name.lower() not in _NOT_PREFERRED] or content
    turns = dict(at for name in content for at in _turns_at(name, first.get(name)))
    if turns:
        found.pop("history", None)
        questions, answers = [at for at in turns if not turns[at]], [at for at in turns if turns[at]]
        if questions and answers:
            return {"prompt": questions[0], "completion": answers[0], **found}
        return {"messages": next((at for at in turns if at.lower() in CHAT_COLUMNS), [*turns][0]), **found}
    if len(content) == 1:
        return {"text": content[0]}
    by_name = {name.lower(): name for name in content}
    answer = next((by_name[name] for name in _ANSWERS if name in by_name), content[-1] if content else "")
    rest = [name for name in content if name != answer]
    if not rest:
        return {"text": answer}
    asked = rest[0] if len(rest) == 1 else "\n".join(f"{name}: {{{name}}}" for name in rest[:6])
    # a system message stands in a conversation, and tools belong to one
    return {"instruction": asked, "output": answer, **found} if found else {"prompt": asked, "completion": answer}


def of_pairs(rows: Rows) -> str:
    """What to say first of data for preference training, which has two answers a row; nothing of other data."""
    paired = any(name.lower() in _NOT_PREFERRED for name in rows.columns)
    return "ftune trains on one answer a row, not on preferences: take the preferred one; " if paired else ""


def block_to_copy(columns: Mapping[str, str], key: str, path: str) -> str:
    """The part of a recipe that names a source and its columns."""
    lines = ["data:", f"  {key}:", f"    path: {_yaml(path)}", "    columns:"]
    lines += [f"      {field}: {_yaml(name)}" for field, name in columns.items()]
    return "\n".join(f"    {line}" for line in lines)


def _yaml(text: str) -> str:
    text = text if len(text) <= 1_000 else f"{text[:997]}..."  # a first line that is no header
    plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", text) and text.lower() not in ("null", "true", "false")
    return text if plain else json.dumps(text, ensure_ascii=False)


def _turns_at(name: str, value: Any) -> Iterator[tuple[str, bool]]:
    """The place of the turns in a column, perhaps inside an object, and whether the assistant begins them."""
    if isinstance(value, Mapping) and not _is_turn(value):
        inner = next((key for key in CHAT_COLUMNS if key in value), None)
        name, value = f"{name}.{inner}", value.get(inner)
    if _is_turn(value) or _holds_turns(value, name.rpartition(".")[2].lower() in CHAT_COLUMNS):
        turn = value[0] if isinstance(value, list) and value else value
        said = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        yield name, ROLES.get(str(said).lower()) == "assistant"


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and not {"role", "from"}.isdisjoint(value)


def _holds_turns(value: Any, named: bool) -> bool:
    """Whether a value is a conversation, or one written as JSON in a column that is named for it."""
    if isinstance(value, list):
        return named or (bool(value) and _is_turn(value[0]))
    return named and isinstance(value, str) and value.lstrip().startswith("[")


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def _texts(value: Any) -> Iterator[str]:
    """What is said in a value: a string, or the contents of turns."""
    waiting = [value]  # not by recursion: a row may be nested as deep as its file has brackets
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str) and inner.strip():
            yield inner.strip()
        elif isinstance(inner, list):
            waiting += [part.get("content", part.get("value")) if isinstance(part, Mapping) else part for part in inner]


def _repeats(value: Any, taken: Sequence[str]) -> bool:
    """Whether a value is one of the texts that are used, or a rendering of all of them."""
    if not isinstance(value, str):
        return False
    text = value.strip()
    return text in taken or (len(taken) > 1 and all(part in text for part in taken))
