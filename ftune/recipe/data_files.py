"""Where the data of a recipe is, and which files of a directory are meant.

Nothing is opened: files are told apart by their names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftune.errors import DataError
from ftune.recipe.locate import HUB_NAME, as_path, looks_local, missing
from ftune.recipe.schema import DataSource

__all__ = ["ADVICE", "DATA_SUFFIXES", "LocatedData", "locate_data"]

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Files that rows are read from."""
ENDINGS = f"files end in {', '.join(DATA_SUFFIXES)}"

ADVICE = {
    **dict.fromkeys(
        (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"), "unpack it: compressed files are not read"
    ),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as .csv, in UTF-8"),
    ".arrow": "in Python, read it with `datasets.Dataset.from_file` (a directory: `datasets.load_from_disk`) and write "
    'it with `.to_json("rows.jsonl")`',
    **{
        suffix: f'in Python{trust}, `pandas.read_{kind}(...).to_json("rows.jsonl", orient="records", lines=True)`'
        for suffix, kind, trust in (
            (".pkl", "pickle", ", if you trust the file"),
            (".pickle", "pickle", ", if you trust the file"),
            (".feather", "feather", ""),
        )
    },
    ".ndjson": "name it .jsonl",
    **dict.fromkeys((".md", ".html", ".pdf", ".docx"), f"write its text to a .txt file; {ENDINGS}"),
}
"""What to do with a file that is not read, by how its name ends."""

# as `datasets` knows the files of a split: by a word of their names, set off by these characters
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "heldout", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_ABOUT_THE_DATA = re.compile(
    r"(readme|license|licence|copying|notice|changelog|authors|citation|requirements)(\..*)?"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json"
)
SHOWN = 5


@dataclass(frozen=True)
class LocatedData:
    """A source of rows.

    Attributes:
        kind: ``hub``, ``file`` or ``directory``.
        path_or_id: The hub data set's name, or the path as given (``~`` expanded).
        files: The files to read, sorted; empty for ``hub``.
        left_out: Of a directory, why something in it is not read and its names, for people.
    """

    kind: Literal["hub", "file", "directory"]
    path_or_id: str
    files: tuple[Path, ...] = ()
    left_out: tuple[str, ...] = ()


def locate_data(
    source: DataSource, key: Literal["train", "eval"] = "train", without: Collection[Path] = ()
) -> LocatedData:
    """Find the rows that a data source names.

    Args:
        source: What the recipe says.
        key: Which source it is: a directory gives other files to each.
        without: Files that a directory does not give: those of the other source.

    Raises:
        DataError: It names a file or directory that is not there, or one that holds no rows ftune can read.
    """
    path = as_path(source.path, DataError)
    if path.is_dir():
        return _in_directory(path, source.path, key, {file.resolve() for file in without})
    if path.exists():
        if not path.is_file():  # a pipe or a device: reading one may never end, and it cannot be read twice
            raise DataError(f"`{source.path}` is no data file, but a pipe or a device", help="write the rows to a file")
        if path.suffix.lower() not in DATA_SUFFIXES:
            raise DataError(f"`{source.path}` is no data file", help=ADVICE.get(path.suffix.lower(), ENDINGS))
        return LocatedData("file", str(path), (path,))
    if path.suffix.lower() in (*DATA_SUFFIXES, *ADVICE) or looks_local(source.path, path):
        raise missing(DataError, source.path, path, what="data file")
    if not HUB_NAME.match(source.path):
        raise DataError(
            f"`{source.path}` is neither a path that exists nor a hub data set", help="those are `org/name`"
        )
    return LocatedData("hub", source.path)


def _in_directory(path: Path, name: str, key: Literal["train", "eval"], without: Collection[Path]) -> LocatedData:
    """The files of a directory that hold a source's rows."""
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    about = [entry for entry in entries if _ABOUT_THE_DATA.fullmatch(entry.name.lower())]
    inner = [entry for entry in entries if entry.is_dir()]
    data = [
        entry for entry in entries if entry.suffix.lower() in DATA_SUFFIXES and entry.is_file() and entry not in about
    ]
    other = [entry for entry in entries if entry not in data and entry not in about and entry not in inner]
    held_out = [file for file in data if file.resolve() in without]
    rest = [file for file in data if file not in held_out]
    split_of = _splits(rest)
    files = _of_split(split_of, key)
    if not files:
        raise _nothing_in(name, rest, held_out, other, inner)
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) > 1:
        raise DataError(
            f"{name}: files of {len(kinds)} kinds in one directory: {', '.join(kinds)}",
            help="keep one kind in the directory, or name one file",
        )
    passed_over = {file: split for file, split in split_of.items() if file not in files}
    reasons = {
        **{
            f"named for another split: {split}": [file for file, its in passed_over.items() if its == split]
            for split in sorted({its for its in passed_over.values() if its is not None})
        },
        f"not named for a split, as {files[0].name} is": [file for file, its in passed_over.items() if its is None],
        "held out": held_out,
        "about the data, by its name": [entry for entry in about if entry.suffix.lower() in DATA_SUFFIXES],
        "no data file": other,
        "a directory": inner,
    }
    left_out = tuple(f"{_shown(these)} ({why})" for why, these in reasons.items() if these)
    return LocatedData("directory", str(path), tuple(files), left_out)


def _of_split(split_of: Mapping[Path, str | None], key: Literal["train", "eval"]) -> list[Path]:
    """The files whose names speak for a source, or for none; for ``eval`` those of the best name."""
    if key == "train":
        return [file for file, split in split_of.items() if split in (None, "train")]
    for wanted in ("validation", "test", None):
        if found := [file for file, split in split_of.items() if split == wanted]:
            return found
    return []


def _splits(files: Sequence[Path]) -> dict[Path, str | None]:
    """The split that each file is named for; None where there is none, or several.

    A table is named by any word of its name, as ``datasets`` has it. A document's name is its subject: `dev-setup.txt`
    is about a set-up. Only `test.txt` itself is the test split, and only where a file of the train split lies beside.
    """
    split_of = {file: _of_document(file) if file.suffix.lower() == ".txt" else _of_table(file) for file in files}
    if "train" in split_of.values():
        return split_of
    return {file: None if file.suffix.lower() == ".txt" else split for file, split in split_of.items()}


def _of_table(file: Path) -> str | None:
    found = {_SPLITS[word] for word in _BETWEEN_WORDS.split(file.stem.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def _of_document(file: Path) -> str | None:
    return _SPLITS.get(re.sub(r"-\d{5}-of-\d{5}$", "", file.stem.lower()))


def _nothing_in(
    name: str, data: Sequence[Path], held_out: Sequence[Path], other: Sequence[Path], inner: Sequence[Path]
) -> DataError:
    if held_out:
        return DataError(
            f"every data file in `{name}` that could be trained on is held out: {_shown(held_out)}",
            help="name other files in `data.eval`, or leave it out and hold out some rows with `eval_fraction`",
        )
    if data:
        return DataError(
            f"every data file in `{name}` is named for another split: {_shown(data)}",
            help=f"name the file itself: `{data[0]}`",
        )
    advice = next((ADVICE[entry.suffix.lower()] for entry in other if entry.suffix.lower() in ADVICE), None)
    if advice is None and inner:
        advice = f"name one of the directories in it: {_shown(inner)}"
    return DataError(f"no data files in `{name}`", help=advice or ENDINGS)


def _shown(entries: Sequence[Path]) -> str:
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return ", ".join(entry.name for entry in entries[:SHOWN]) + more
