"""Rows from files and hub data sets, each with the place it came from.

Text files are parsed here and not by ``datasets``: a mistake is then reported with its line, rows keep the
keys that they were written with (a missing key is not the same as a null), and no cache is written that two
processes could race for. Parquet and hub data sets go through ``datasets``.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ftune.errors import DataError
from ftune.recipe.locate import locate_data
from ftune.recipe.schema import DataSource

__all__ = ["DECODER", "Row", "Rows", "load_rows"]

Row = Mapping[str, Any]
# one parsed row and the line on which it starts; 0 in files without lines
Placed = tuple[Row, int]


@dataclass(frozen=True)
class Rows:
    """Rows of one source and where each was written.

    Attributes:
        source: Every row that was read; a list, or a ``datasets.Dataset``.
        columns: Every key of any row, in order of first appearance.
        origin: Names of the files, or one name for a hub data set.
        fingerprint: sha256 over the bytes of the file; of several, over the length and the bytes of each; of a
            hub data set, its fingerprint in ``datasets``.
        numbers: Which rows of ``source`` these are, counted from 0.
        file_of: Index into ``origin`` for each row of ``source``; empty: all from the first.
        line_of: Line of each row of ``source``, counted from 1; empty where there are no lines.
        commit: Of the hub, for a data set whose files say from which they are.
    """

    source: Sequence[Row]
    columns: tuple[str, ...]
    origin: tuple[str, ...]
    fingerprint: str
    numbers: Sequence[int]
    file_of: Sequence[int] = ()
    line_of: Sequence[int] = ()
    commit: str | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Each row with its number in the source."""
        if len(self.numbers) == len(self.source):
            # a Dataset iterates in large reads, and indexes in small ones
            yield from zip(self.numbers, self.source, strict=True)
        else:
            for number in self.numbers:
                yield number, self.source[number]

    def where(self, number: int) -> str:
        """``file:line`` of a row by its number in the source, or ``name: row N`` (from 1) without lines."""
        file = self.file_of[number] if self.file_of else 0
        if self.line_of and self.line_of[number]:
            return f"{self.origin[file]}:{self.line_of[number]}"
        first = self.file_of.index(file) if self.file_of else 0
        return f"{self.origin[file]}: row {number - first + 1}"

    def select(self, numbers: Sequence[int]) -> Rows:
        """Some of the rows, in the source's order, named by their numbers in it."""
        return replace(self, numbers=tuple(sorted(numbers)))


def load_rows(source: DataSource) -> Rows:
    """Read a file, a directory of files of one kind, or a hub data set.

    Raises:
        DataError: Nothing is there, a file is empty or malformed (with its line), or the hub does not answer.
    """
    located = locate_data(source)
    if located.kind == "hub":
        return _read_hub(source)
    if located.kind == "directory":
        kinds = sorted({file.suffix.lower() for file in located.files})
        if len(kinds) > 1:
            raise DataError(
                f"{source.path}: files of {len(kinds)} kinds in one directory: {', '.join(kinds)}",
                help="keep one kind in the directory, or name one file",
            )
    return _read_files(located.files, source.max_examples)


# --- local files ---


def _read_files(files: Sequence[Path], limit: int | None) -> Rows:
    """Concatenate the rows of files of one kind; every file counts into the fingerprint."""
    digest = hashlib.sha256()
    rows: list[Row] = []
    file_of: list[int] = []
    line_of: list[int] = []
    for index, file in enumerate(files):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error
        if len(files) > 1:  # the same bytes, cut into files elsewhere, are other rows
            digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
        wanted = None if limit is None else limit - len(rows)
        placed = list(islice(READERS[file.suffix.lower()](file, content), wanted))
        if not placed and wanted != 0:
            raise DataError(f"{file}: no rows in this file")
        rows += [row for row, _ in placed]
        line_of += [line for _, line in placed]
        file_of += [index] * len(placed)
    return Rows(
        source=rows,
        columns=tuple({key: None for row in rows for key in row}),
        origin=tuple(str(file) for file in files),
        fingerprint=digest.hexdigest(),
        numbers=range(len(rows)),
        file_of=file_of,
        line_of=line_of,
    )


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
        yield row, 0


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


# --- the hub ---


def _read_hub(source: DataSource) -> Rows:
    """A data set of the hub, or of its local cache."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name = source.path if source.subset is None else f"{source.path} ({source.subset})"
    try:
        with _logged_files() as unreadable:
            rows = load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except OSError as error:  # ConnectionError and DatasetNotFoundError are among them
        raise DataError(
            f"data set {name!r}: neither a local file or directory nor reachable on the hub: "
            f"{str(error).splitlines()[0]}",
            help="check the spelling, the network, HF_HUB_OFFLINE, and HF_TOKEN if the data set is gated",
        ) from error
    except RuntimeError as error:  # a data set that is a Python script
        raise DataError(
            f"data set {name!r}: {str(error).splitlines()[0]}",
            help="try `revision: refs/convert/parquet`, where the hub keeps some data sets converted",
        ) from error
    except ValueError as error:  # an unknown subset or split: the message lists those that there are
        raise DataError(f"data set {name!r}: {str(error).splitlines()[0]}") from error
    except DatasetsError as error:  # files that are not what their names say, or not all of one kind
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        file = f"{unreadable[-1]}: " if unreadable else ""
        raise DataError(
            f"data set {name!r}: {file}{' '.join(str(cause).split())[:500]}",
            help="download the files, mend them, and name them by path; or take another `subset` or `revision`",
        ) from error
    commit = _commit(rows)
    if commit is not None and re.fullmatch("[0-9a-f]{40}", source.revision or "") and commit != source.revision:
        # without the hub, `datasets` takes what it has cached last, whatever is asked for
        raise DataError(
            f"data set {name!r}: revision {source.revision} was asked for, but the local cache gives {commit}",
            help="let the hub be reached (network, HF_HUB_OFFLINE), or name that revision's files by path",
        )
    if source.max_examples is not None:
        rows = rows.select(range(min(source.max_examples, len(rows))))
    if len(rows) == 0:
        raise DataError(f"data set {name!r}: split {source.split!r} has no rows")
    return Rows(
        source=rows,
        columns=tuple(rows.column_names),
        origin=(f"{name}, split {source.split}",),
        fingerprint=str(rows._fingerprint),
        numbers=range(len(rows)),
        commit=commit,
    )


def _commit(rows: Any) -> str | None:
    """The commit that ``datasets`` read: it stands in the addresses of the files, and in the cache's path."""
    addresses = [*(rows.info.download_checksums or ()), *(entry["filename"] for entry in rows.cache_files)]
    found = {match[1] for text in addresses if (match := re.search(r"[@/]([0-9a-f]{40})/", text))}
    return found.pop() if len(found) == 1 else None


@contextlib.contextmanager
def _logged_files() -> Iterator[list[str]]:
    """The files that ``datasets`` complains about: its exceptions do not name them, its log does."""
    import logging

    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.extend(re.findall(r"\bfile '([^']+)' with error", record.getMessage()))

    logger, listener = logging.getLogger("datasets"), Listener(logging.ERROR)
    logger.addHandler(listener)
    try:
        yield found
    finally:
        logger.removeHandler(listener)
