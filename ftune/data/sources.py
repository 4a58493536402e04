"""Rows from files and hub data sets, each with the place it came from.

Files are parsed by ``readers``; hub data sets go through ``datasets``.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

from ftune.data.decoding import Row
from ftune.data.readers import SPLITS_ON, read_file, without_nested_nulls
from ftune.errors import DataError
from ftune.recipe.data_files import locate_data
from ftune.recipe.schema import DataSource

__all__ = ["Changed", "Row", "Rows", "load_rows"]


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
        named: Where the recipe maps columns: what each was made from.
        notes: What should be told of the source: what of it is not used.
    """

    source: Sequence[Row]
    columns: tuple[str, ...]
    origin: tuple[str, ...]
    fingerprint: str
    numbers: Sequence[int]
    file_of: Sequence[int] = ()
    line_of: Sequence[int] = ()
    commit: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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


class Changed(Sequence[Row]):
    """Rows with each one changed when it is asked for.

    Args:
        source: The rows.
        change: What becomes of one.
    """

    def __init__(self, source: Sequence[Row], change: Callable[[Row], Row]) -> None:
        self._source, self._change = source, change

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Row]:
        return map(self._change, self._source)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """One row, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._change(self._source[index])


def load_rows(source: DataSource, key: Literal["train", "eval"] = "train", without: Collection[Path] = ()) -> Rows:
    """Read a file, the files of a directory, or a hub data set.

    Args:
        source: What to read.
        key: Which source of the recipe it is: a directory gives other files to each.
        without: Files that a directory does not give.

    Raises:
        DataError: Nothing is there, a file is empty or malformed (with its line), or the hub does not answer.
    """
    located = locate_data(source, key, without)
    if located.kind == "hub":
        return _read_hub(source)
    rows = _read_files(located.files, source.max_examples, source.split_on)
    left_out = tuple(f"data.{key}: left out of {source.path}: {text}" for text in located.left_out)
    return replace(rows, notes=left_out)


# --- local files ---


def _read_files(files: Sequence[Path], limit: int | None, split_on: str | None) -> Rows:
    """Concatenate the rows of files of one kind; every file counts into the fingerprint."""
    digest = hashlib.sha256()
    if split_on is not None:
        digest.update(split_on.encode())
    separated = split_on in (None, *SPLITS_ON)
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
        separated |= split_on is not None and split_on.encode() in content.replace(b"\r\n", b"\n")
        wanted = None if limit is None else limit - len(rows)
        placed = list(islice(read_file(file, content, split_on), wanted))
        if not placed and wanted != 0:
            raise DataError(f"{file}: no rows in this file")
        rows += [row for row, _ in placed]
        line_of += [line for _, line in placed]
        file_of += [index] * len(placed)
    if not separated:
        where = "it" if len(files) == 1 else "these files"
        raise DataError(
            f"{files[0]}: `split_on` names the separator {split_on!r}, which is nowhere in {where}",
            help="remove `split_on`: a file is then one document",
        )
    return Rows(
        source=rows,
        columns=tuple({key: None for row in rows for key in row}),
        origin=tuple(str(file) for file in files),
        fingerprint=digest.hexdigest(),
        numbers=range(len(rows)),
        file_of=file_of,
        line_of=line_of,
    )


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
        source=Changed(rows, without_nested_nulls),
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
