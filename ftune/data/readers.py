"""Files as rows, each with the line on which it starts.

Text files are parsed here and not by ``datasets``: a mistake is then reported with its line, rows keep the
keys that they were written with (a missing key is not the same as a null), values stay what was written (``007`` in a
.csv is no number, and ``NA`` no missing value), and no cache is written that two processes could race for. Parquet goes
through ``datasets``.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftune.data.csv_reader import read_csv
from ftune.data.decoding import Placed, Row, decode
from ftune.errors import DataError

__all__ = ["DECODER", "SPLITS_ON", "read_file", "without_nested_nulls"]


_OBJECTS = 'every row is an object: {"messages": [...]} for a conversation, {"text": "..."} for a text'

# half of a surrogate pair can only come from an escape: decoding refuses it in the bytes of a file
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _is_row(file: Path, line: int, value: Any, text: str) -> Row:
    """The value if it is an object whose strings are all text; ``text`` is what it was parsed from."""
    if not isinstance(value, dict):
        raise DataError(f"{file}:{line}: expected a JSON object, found {_json_type(value)}", help=_OBJECTS)
    if _SURROGATE_ESCAPE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            escape = f"\\u{ord(error.object[error.start]):04x}"
            raise DataError(
                f"{file}:{line}: the escape {escape} stands for half of a surrogate pair, which is no character",
                help="write both halves of the pair, or the character itself in UTF-8",
            ) from error
    return value


def _long_integer(file: Path, line: int) -> DataError:
    """The error for an integer that Python refuses to convert, the only other ValueError of the JSON decoder."""
    return DataError(
        f"{file}:{line}: an integer of more than {sys.get_int_max_str_digits()} digits",
        help='put it between double quotes: "123"',
    )


class _Unlike(ValueError):
    """JSON as Python reads it that other readers refuse or read in another way."""


def _no_number(name: str) -> Any:
    raise _Unlike(f"{name} is no JSON")


def _finite(text: str) -> float:
    """A number with a point or an exponent; Python makes infinity of what is too large."""
    number = float(text)
    if math.isinf(number):
        raise _Unlike(f"{text[:40]} is too large for a number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two equal keys Python would take the last, and lose the other without a word."""
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _Unlike(f"an object has the key {name[:40]!r} twice")
    return made


DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_object)
_MENDS = "write null or a string for a number that is none, and every key once"


def _read_jsonl(file: Path, content: bytes) -> Iterator[Placed]:
    """One JSON object a line; blank lines are passed over."""
    # not str.splitlines: it also breaks at U+2028 and others, which may stand inside a JSON string
    for line, text in enumerate(decode(file, content).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = _is_row(file, line, DECODER.decode(text), text)
        except json.JSONDecodeError as error:
            reason = _reason(error)
            if text.startswith("\ufeff"):
                reason = "a byte order mark inside the file"
            raise DataError(
                f"{file}:{line}:{error.colno}: not valid JSON: {reason}",
                help="a .jsonl file has one JSON object a line",
            ) from error
        except _Unlike as error:
            raise DataError(f"{file}:{line}: {error}", help=_MENDS) from error
        except ValueError as error:
            raise _long_integer(file, line) from error
        except RecursionError as error:
            raise DataError(f"{file}:{line}: JSON nested too deeply") from error
        yield row, line


def _read_json(file: Path, content: bytes) -> Iterator[Placed]:
    """A list of objects, or objects one after the other: usually one a line."""
    text = decode(file, content)
    start = _skip(text, 0)
    if start == len(text):
        return
    if text[start] == "[":
        yield from _read_values(file, text, start)
    elif file.suffix.lower() == ".jsonl" or text[start] == "{":
        yield from _read_objects(file, content, text, start)
    else:
        raise DataError(f"{file}:{text.count(chr(10), 0, start) + 1}: expected a JSON list of objects")


def _read_objects(file: Path, content: bytes, text: str, start: int) -> Iterator[Placed]:
    """Objects one a line; or, where the first is written over several lines, as they come."""
    if text.find("\n", start) == start + 1 or text[start : text.find("\n", start)].rstrip() == "{":
        try:
            _, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = 0
        if end and text[_skip(text, end) : _skip(text, end) + 1] == "{":
            yield from _read_values(file, text, start)
            return
    if file.suffix.lower() == ".json":
        yield from _read_jsonl_or_explain(file, content)
    else:
        yield from _read_jsonl(file, content)


def _read_values(file: Path, text: str, start: int) -> Iterator[Placed]:
    """The objects of a JSON list, or objects without a list around them, each with the line where it begins."""
    # item by item and not json.loads: each row then has its line
    listed = text[start] == "["
    line, counted, position = 1, 0, _skip(text, start + 1) if listed else start
    if listed and text[position : position + 1] == "]":
        return
    try:
        while listed or position < len(text):
            line, counted = line + text.count("\n", counted, position), position
            value, end = DECODER.raw_decode(text, position)
            yield _is_row(file, line, value, text[position:end]), line
            position = _skip(text, end)
            if not listed:
                continue
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
            position = _skip(text, position + 1)
        end = _skip(text, position + 1)
        if end < len(text):
            raise json.JSONDecodeError("text behind the end of the list", text, end)
    except json.JSONDecodeError as error:
        help = _OBJECTS if "behind the end" in error.msg else None
        raise DataError(f"{file}:{error.lineno}:{error.colno}: not valid JSON: {_reason(error)}", help=help) from error
    except _Unlike as error:
        raise DataError(f"{file}:{line}: {error}", help=_MENDS) from error
    except ValueError as error:
        raise _long_integer(file, line) from error
    except RecursionError as error:
        raise DataError(f"{file}:{line}: JSON nested too deeply") from error


def _read_jsonl_or_explain(file: Path, content: bytes) -> Iterator[Placed]:
    """Rows of a .json file that begins with an object: one object a line, or a mistake."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        yield from _read_jsonl(file, content)
        return
    # a key may hold half of a surrogate pair, which no terminal can print
    keys = ", ".join(key[:40] for key in list(whole)[:5]).encode(errors="backslashreplace").decode()
    raise DataError(
        f"{file}: expected a JSON list of objects, found one object with the keys {keys}",
        help="save the list alone: [{...}, {...}]; or name the file .jsonl, if the object is its only row",
    )


SPLITS_ON = ("line", "blank_line")
"""Where texts are cut, beside the text of a separator."""


def _read_txt(file: Path, content: bytes, split_on: str | None) -> Iterator[Placed]:
    """Documents as the column ``text``: the whole file, or what stands between separators; blank ones are passed over.

    Line breaks around a document are no part of it.
    """
    text = decode(file, content).replace("\r\n", "\n")
    if split_on is None:
        pieces = [text]
    elif split_on == "line":
        pieces = text.split("\n")
    else:
        pieces = re.split(r"(\n(?:[ \t]*\n)+)" if split_on == "blank_line" else f"({re.escape(split_on)})", text)
    line = 1
    for index, piece in enumerate(pieces):
        separator = index % 2 == 1 and split_on not in (None, "line")
        if piece.strip() and not separator:
            lead = piece[: len(piece) - len(piece.lstrip())].count("\n")
            yield {"text": piece.strip("\n")}, line + lead
        line += 1 if split_on == "line" else piece.count("\n")


def _read_parquet(file: Path, content: bytes) -> Iterator[Placed]:
    """Rows of a parquet file, which have no lines."""
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        if not pyarrow.parquet.read_metadata(file).num_rows:  # datasets fails on none
            return
        # a cache of its own: two processes that read the same file do not meet
        with tempfile.TemporaryDirectory() as cache:
            rows = Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # datasets wraps pyarrow's errors in classes of its own
        cause = error.__cause__ or error
        raise DataError(
            f"{file}: not a readable parquet file: {str(cause).splitlines()[0]}",
            help="write the file again, or its rows as .jsonl",
        ) from error
    finally:
        if shown:
            enable_progress_bar()
    numbered = enumerate(rows, 1)
    number = 0
    while True:
        try:
            number, row = next(numbered)
        except StopIteration:
            return
        except Exception as error:  # what decodes a cell (an image, say) may raise anything
            why = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            raise DataError(
                f"{file}: row {number + 1}: cannot be decoded: {why}",
                help="leave out the columns that are not text",
            ) from error
        yield without_nested_nulls(row), 0


def without_nested_nulls(row: Row) -> Row:
    """A row of a table without the nulls inside its columns: there all objects get the keys of all.

    A column itself may be null. A null that was written cannot be told from one that the table added.
    """

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items() if inner is not None}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return {key: without(value) for key, value in row.items()}


def read_file(file: Path, content: bytes, split_on: str | None = None) -> Iterator[Placed]:
    """The rows of a file of any kind, by how its name ends.

    Args:
        file: Its name.
        content: Its bytes.
        split_on: Where a .txt file is cut into documents.

    Raises:
        DataError: It is malformed; names the line.
    """
    match file.suffix.lower():
        case ".jsonl" | ".json":
            return _read_json(file, content)
        case ".csv" | ".tsv":
            return read_csv(file, content)
        case ".parquet":
            return _read_parquet(file, content)
        case _:
            return _read_txt(file, content, split_on)


def _reason(error: json.JSONDecodeError) -> str:
    """What is wrong, without Python's pointer to the position that the message gives anyway."""
    return error.msg.removesuffix(" starting at").lower()


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not JSON white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
