"""Rows of a CSV or TSV file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftune.data.decoding import Placed, decode
from ftune.errors import DataError

__all__ = ["HEADER", "read_csv"]

# of the smallest platform: csv keeps its limit in a C long
_C_LONG_MAX = 2**31 - 1


def read_csv(file: Path, content: bytes) -> Iterator[Placed]:
    """Values under a header, each a string as it is written: ``007``, ``NA`` and ``1.0`` stay what they are.

    Commas lie between the values, or what alone cuts the header into several names: semicolons, tabs or bars.
    """
    text = decode(file, content)
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
