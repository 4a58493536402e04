"""The text of a data file, and rows with their places."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftune.errors import DataError
from ftune.recipe.data_files import ADVICE

__all__ = ["Placed", "Row", "decode"]

Row = Mapping[str, Any]
Placed = tuple[Row, int]
"""One parsed row and the line on which it starts; 0 in files without lines."""
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def decode(file: Path, content: bytes) -> str:
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
