"""A source of the recipe as rows of a known format, with what should be told of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ftune.data.columns import renamed
from ftune.data.formats import Format, columns_of, fits, incomplete, resolve_format
from ftune.data.leftover import empty_note, is_about_the_row, note, proposal, refusal, unused_columns
from ftune.data.sources import Rows, load_rows
from ftune.errors import DataError, LocatedDataError
from ftune.recipe.schema import ColumnMap, DataSource

__all__ = ["columns_for", "read_source"]


def read_source(
    source: DataSource,
    key: Literal["train", "eval"] = "train",
    like: DataSource | None = None,
    without: Collection[Path] = (),
) -> tuple[Rows, Format]:
    """Read a source, under the names that its format knows.

    Args:
        source: What to read.
        key: Which source of the recipe it is.
        like: The source whose columns, format and `split_on` this one takes where it has none of its own.
        without: Files that a directory does not give: those of the other source.

    Raises:
        DataError: It cannot be read, no format fits, or columns would be left over that look like content.
    """
    at: tuple[str, ...] = ("data", key, "columns")
    columns = source.columns
    if columns is None and like is not None and like.columns is not None:
        columns, at = like.columns, ("data", key)
    if source.split_on is None and like is not None:
        source = source.model_copy(update={"split_on": like.split_on})
    read = load_rows(source, key, without)
    rows, used = (read, ()) if columns is None or not columns.given() else renamed(read, columns, at)
    asked = source.format
    if asked == "auto" and like is not None and like.format != "auto" and fits(like.format, rows.columns):
        asked = like.format
    format = resolve_format(rows, asked, source.path, key)
    taken = columns_of(format, rows)
    idle = [name for name in rows.named if name not in taken]
    if idle:
        help = "put it into the text of `prompt`, or use `instruction` and `output`"
        where = f"format `{format}`{', whose prompts are texts' if format == 'prompt_completion' else ''}"
        raise LocatedDataError([((*at, name), f"`{name}` has no place in {where}", help) for name in idle])
    used = used or taken
    unused = unused_columns(read, used)
    if not rows.named and asked == "auto":
        content = {name: one for name, one in unused.items() if not is_about_the_row(name)}
        if content and not incomplete(format, rows):
            raise refusal(content, read, format, used, key, source.path)
    in_text = [name for name in used if any(f"{{{name}" in text for text in rows.named.values())]
    return replace(rows, notes=(*rows.notes, *note(unused, read, key), *empty_note(read, in_text, key))), format


def columns_for(source: DataSource) -> dict[str, str]:
    """What a new recipe has to say of the columns of a file; nothing where they say it themselves.

    A question and its answer make a conversation, in the chat template if there is one.

    Raises:
        DataError: It cannot be read, or no columns make examples of it.
    """
    try:
        read_source(source)
        return {}
    except DataError:
        rows = load_rows(source, "train")
    found = proposal(rows)
    _, first = next(iter(rows))
    if found.keys() == {"prompt", "completion"} and isinstance(first.get(found["completion"]), str):
        found = {"instruction": found["prompt"], "output": found["completion"]}
    read_source(source.model_copy(update={"columns": ColumnMap(**found)}))
    return found
