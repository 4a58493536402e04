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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftune.errors import DataError
from ftune.recipe.data_files import ADVICE

__all__ = ["DECODER", "SPLITS_ON", "Placed", "Row", "read_file", "without_nested_nulls"]

Row = Mapping[str, Any]
Placed = tuple[Row, int]
"""One parsed row and the line on which it starts; 0 in files without lines."""


_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def _decode(file: Path, content: bytes) -> str:
    """The text of a file; a UTF-8 byte order mark at its start is dropped."""
    for start, kind in _PACKED.items():
        if content.startswith(start):
            raise DataError(f"{file}: the file is packed ({kind})", help=ADVICE[".gz"])
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{file}: the file is UTF-16, not UTF-8", help="save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{line}: not valid UTF-8 (byte 0x{content[error.start]:02x})",
            help=f"save the file as UTF-8; if it is Windows': iconv -f cp1252 -t utf-8 {file.name} > utf8-{file.name}",
        ) from error


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
    """A list of objects, or objects one after the other: usually one a line."""
    text = _decode(file, content)
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


# of the smallest platform: csv keeps its limit in a C long
_C_LONG_MAX = 2**31 - 1


def _read_csv(file: Path, content: bytes) -> Iterator[Placed]:
    """Values under a header, each a string as it is written: ``007``, ``NA`` and ``1.0`` stay what they are.

    Commas lie between the values, or what alone cuts the header into several names: semicolons, tabs or bars.
    """
    text = _decode(file, content)
    # Python's own limit of 131,072 characters is shorter than a long document; the whole file is already in
    # memory, so no cell needs another bound than its length. The limit is global, hence only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), min(len(content), _C_LONG_MAX)))
    skipped = 0
    if told := re.match(r'"?sep=(.)"?\r?\n', text):  # Excel's own way to name what lies between the values
        text, skipped = text[told.end() :], 1
    line = 1 + skipped
    try:
        if file.suffix.lower() == ".tsv":
            reader = _csv(text, "\t", quoting=csv.QUOTE_MINIMAL if _is_quoted(text) else csv.QUOTE_NONE)
        else:
            delimiter = told[1] if told else _delimiter(text[:HEADER])
            spaced = _is_spaced(next(_csv(text[:HEADER], delimiter), []))
            reader = _csv(text, delimiter, skipinitialspace=spaced)
        header = [name.strip() for name in next((values for values in reader if values), [])]
        columns = len(header)
        while columns and not header[columns - 1]:  # a sheet that was once wider leaves columns without a name
            columns -= 1
        header = header[: columns or None]
        if len(set(header)) != len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError(
                f"{file}:{reader.line_num + skipped}: the header names the column {twice[:40]!r} twice",
                help="the first line of the file names its columns, each by its own name",
            )
        line = reader.line_num + 1 + skipped
        for values in reader:
            if values and (len(values) < len(header) or any(values[len(header) :])):
                raise DataError(
                    f"{file}:{line}: {len(values)} values under a header of {len(header)} columns",
                    help='put a value that holds a comma or a line break between double quotes: "a, b"',
                )
            if values:
                yield dict(zip(header, values, strict=False)), line
            line = reader.line_num + 1 + skipped
    except csv.Error as error:
        raise DataError(
            f"{file}:{line}: not valid CSV: {error}",
            help="a value that begins with a double quote ends with one; inside it, write '\"\"' for '\"'",
        ) from error


HEADER = 100_000
"""Characters in which a header ends."""


def _csv(text: str, delimiter: str, **options: Any) -> Any:
    return csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter, **options)


def _delimiter(start: str) -> str:
    """What lies between the values of a file, by its header: a comma, or what alone cuts it into several names."""
    for delimiter in (",", ";", "\t", "|"):
        try:
            if len(next((values for values in _csv(start, delimiter) if values), [])) > 1:
                return delimiter
        except csv.Error:
            continue
    return ","


def _is_quoted(text: str) -> bool:
    """Whether double quotes enclose values in a .tsv; to most programs that write such files they are text."""
    try:
        return len({len(values) for values in _csv(text, "\t") if values}) == 1
    except csv.Error:
        return False


def _is_spaced(header: Sequence[str]) -> bool:
    """Whether a space follows every delimiter; it is then no part of the values."""
    return len(header) > 1 and all(name.startswith(" ") for name in header[1:])


SPLITS_ON = ("line", "blank_line")
"""Where texts are cut, beside the text of a separator."""


def _read_txt(file: Path, content: bytes, split_on: str | None) -> Iterator[Placed]:
    """Documents as the column ``text``: the whole file, or what stands between separators; blank ones are passed over.

    Line breaks around a document are no part of it.
    """
    text = _decode(file, content).replace("\r\n", "\n")
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
            return _read_csv(file, content)
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
