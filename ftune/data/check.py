"""Everything that is wrong with the rows of a recipe, and not the first mistake alone: for ``ftune validate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from ftune.data.encode import Encoder
from ftune.data.encoded import RowError
from ftune.data.formats import Format, Record, convert
from ftune.data.read import read_source
from ftune.data.sources import Rows
from ftune.data.tokenize import encoder_for, template_for
from ftune.errors import DataError
from ftune.recipe.data_files import locate_data
from ftune.recipe.schema import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MOST", "mistakes_in", "read_all"]

MOST = 50
"""Rows of a source that are named; more are counted."""

Read = tuple[Rows, Format]


def read_all(spec: DataSpec) -> tuple[list[Read], list[DataError]]:
    """The sources that can be read, and what is wrong with the others."""
    read: list[Read] = []
    errors: list[DataError] = []
    keys: list[Literal["train", "eval"]] = ["train", *(["eval"] if spec.eval is not None else [])]  # type: ignore[list-item]
    for key in keys:
        try:
            if key == "eval":
                assert spec.eval is not None
                read.append(read_source(spec.eval, key, like=spec.train))
            else:
                held_out = () if spec.eval is None else locate_data(spec.eval, "eval").files
                read.append(read_source(spec.train, without=held_out))
        except DataError as error:
            errors.append(error)
    return read, errors


def mistakes_in(read: Sequence[Read], spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> list[DataError]:
    """One error for each source with rows that cannot be trained on; it names up to ``MOST`` of them."""
    errors: list[DataError] = []
    for rows, format in read:
        try:
            template = template_for(tokenizer, spec, format, rows)
            records = convert(rows, format, chat_template=template is not None, shown=MOST)
            errors += _not_encoded(encoder_for(tokenizer, template, spec, format), records, rows)
        except DataError as error:
            errors.append(error)
    return errors


def _not_encoded(encoder: Encoder, records: Sequence[Record], rows: Rows) -> Iterator[DataError]:
    """The records that the chat template or the tokenizer refuses, as one error."""
    try:
        encoder.encode(records)
        return
    except RowError as error:
        if error.row is None:
            yield DataError(f"{rows.origin[0]}: {error.message}", help=error.help)
            return
    lines: list[str] = []
    help: str | None = None
    refused = 0
    for record in records:
        try:
            encoder.encode([record])
        except RowError as error:
            refused += 1
            help = help or error.help
            if refused <= MOST:
                lines.append(f"\n  {rows.where(record.row)}: {error.message}")
    more = f"\n  and {refused - MOST} more" if refused > MOST else ""
    yield DataError(f"{refused} of {len(rows)} rows cannot be written as tokens{''.join(lines)}{more}", help=help)
