"""Files as rows, each with the line on which it starts.

Text files are parsed here and not by ``datasets``: a mistake is then reported with its line, rows keep the
keys that they were written with (a missing key is not the same as a null), values stay what was written (``007`` in a
.csv is no number, and ``NA`` no missing value), and no cache is written that two processes could race for. Parquet goes
through ``datasets``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftune.errors import DataError

__all__ = ["DECODER", "READERS", "Placed", "Row", "without_nested_nulls"]

Row = Mapping[str, Any]
Placed = tuple[Row, int]
"""One parsed row and the line on which it starts; 0 in files without lines."""


def _decode(file: Path, content: bytes) -> str:
    """The text of a file; a UTF-8 byte order mark at its start is dropped."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{file}: the file is UTF-16, not UTF-8", help="save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{line}: not valid UTF-8 (byte 0x{content[error.start]:02x})",
            help="save the file as UTF-8",
        ) from error


# half of a surrogate pair can only come from an escape: decoding refuses it in the bytes of a file
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _is_row(file: Path, line: int, value: Any, text: str) -> Row:
    """The value if it is an object whose strings are all text; ``text`` is what it was parsed from."""
    if not isinstance(value, dict):
        raise DataError(f"{file}:{line}: expected a JSON object, found {_json_type(value)}")
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
    for line, text in enumerate(_decode(file, content).split("\n"), 1):
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
    """A JSON list of objects; a file of one object a line is read as .jsonl."""
    text = _decode(file, content)
    start = _skip(text, 0)
    if start == len(text):
        return
    if text[start] == "{":
        yield from _read_jsonl_or_explain(file, content)
        return
    if text[start] != "[":
        raise DataError(f"{file}:{text.count(chr(10), 0, start) + 1}: expected a JSON list of objects")
    # item by item and not json.loads: each row then has its line
    line, counted, position = 1, 0, _skip(text, start + 1)
    if text[position : position + 1] == "]":
        return
    try:
        while True:
            line, counted = line + text.count("\n", counted, position), position
            value, end = DECODER.raw_decode(text, position)
            yield _is_row(file, line, value, text[position:end]), line
            position = _skip(text, end)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
            position = _skip(text, position + 1)
        end = _skip(text, position + 1)
        if end < len(text):
            raise json.JSONDecodeError("text behind the end of the list", text, end)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}:{error.colno}: not valid JSON: {_reason(error)}") from error
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
        help="save the list alone: [{...}, {...}]",
    )


# of the smallest platform: csv keeps its limit in a C long
_C_LONG_MAX = 2**31 - 1


def _read_csv(file: Path, content: bytes) -> Iterator[Placed]:
    """Comma-separated values under a header; every value is a string."""
    # Python's own limit of 131,072 characters is shorter than a long document; the whole file is already in
    # memory, so no cell needs another bound than its length. The limit is global, hence only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), min(len(content), _C_LONG_MAX)))
    reader = csv.reader(io.StringIO(_decode(file, content), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError(f"{file}:1: the header names the column {twice[:40]!r} twice")
        line = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                raise DataError(
                    f"{file}:{line}: {len(values)} values under a header of {len(header)} columns",
                    help='put a value that holds a comma or a line break between double quotes: "a, b"',
                )
            if values:
                yield dict(zip(header, values, strict=True)), line
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{line}: not valid CSV: {error}") from error


def _read_txt(file: Path, content: bytes) -> Iterator[Placed]:
    """One document a line, as the column ``text``; blank lines are passed over."""
    for line, text in enumerate(_decode(file, content).split("\n"), 1):
        if text.strip():
            yield {"text": text.rstrip("\r")}, line


def _read_parquet(file: Path, content: bytes) -> Iterator[Placed]:
    """Rows of a parquet file, which have no lines."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        # a cache of its own: two processes that read the same file do not meet
        with tempfile.TemporaryDirectory() as cache:
            rows = Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # datasets wraps pyarrow's errors in classes of its own
        cause = error.__cause__ or error
        raise DataError(f"{file}: not a readable parquet file: {str(cause).splitlines()[0]}") from error
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


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


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
