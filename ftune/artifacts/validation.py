"""What ``ftune validate`` says of a recipe's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ftune.data.check import mistakes_in, read_all
from ftune.data.notes import notes_of_splits
from ftune.data.show import show_examples, show_row
from ftune.data.splits import Split, Splits
from ftune.data.tokenize import load_splits
from ftune.errors import DataError, FtuneError, LocatedDataError
from ftune.plan.base_model import load_tokenizer
from ftune.plan.tokens import markers_without_token
from ftune.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Validated", "checked_splits", "validated"]


@dataclass(frozen=True)
class Validated:
    """Data that can be trained on.

    Attributes:
        shown: Examples, as text.
        told: A line of counts for each source, and what should be known of it.
        counts: The same as JSON-able data.
    """

    shown: tuple[str, ...]
    told: tuple[str, ...]
    counts: dict[str, Any]


def validated(recipe: Recipe, *, rows: Sequence[int] = (), examples: int = 0, color: bool = False) -> Validated:
    """Read and tokenize everything, and say what it is.

    Args:
        recipe: A checked recipe.
        rows: Rows to show as they are trained, counted from 1.
        examples: How many of the first examples to show.
        color: Use ANSI colours.

    Raises:
        DataError: Anything in the data that cannot be trained on: all that is found.
        ModelError: The tokenizer cannot be read.
    """
    try:
        tokenizer = load_tokenizer(recipe.model, recipe.data.chat_template)
    except FtuneError as error:
        if errors := read_all(recipe.data)[1]:
            raise _together(errors) from error
        help = f"{error.help}; " if error.help else ""
        raise type(error)(error.message, help=f"{help}--no-data checks the recipe alone") from error
    splits = checked_splits(recipe, tokenizer)
    shown = [show_row(splits, tokenizer, number, color=color) for number in rows]
    if examples:
        shown.append(show_examples(splits.train, tokenizer, examples, color=color))
    named = [("train", splits.train), *([("eval", splits.eval)] if splits.eval else [])]
    notes = notes_of_splits(splits)
    if splits.train.format in ("messages", "sharegpt"):
        notes += markers_without_token(tokenizer, recipe.model.id)
    if splits.eval is None:
        notes.append(
            "no rows are held out: `data.eval_fraction: 0.1` holds out a tenth, `data.eval: FILE` names others"
        )
    return Validated(
        tuple(f"{text}\n" for text in shown),
        (*(_counted(key, split) for key, split in named), *notes),
        {
            **{key: {"format": split.format, **asdict(split.stats)} for key, split in named},
            "overlap": asdict(splits.overlap),
            "notes": notes,
        },
    )


def checked_splits(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """The recipe's rows, tokenized.

    Raises:
        DataError: Anything in the data that cannot be trained on: all that is found, each at its place in the files.
    """
    try:
        return load_splits(recipe.data, tokenizer, recipe.training.seed)
    except DataError as error:
        read, errors = read_all(recipe.data)
        raise _together([*errors, *mistakes_in(read, recipe.data, tokenizer)] or [error]) from error


def _counted(key: str, split: Split) -> str:
    stats, files = split.stats, len(split.rows.origin)
    where = split.rows.origin[0] if files == 1 else f"{files:,} files"
    rows = "1 row" if stats.rows == 1 else f"{stats.rows:,} rows"
    return (
        f"data.{key}: {where}: format {split.format}, {rows}, {stats.tokens:,} tokens, "
        f"{stats.target_tokens:,} in the loss"
    )


def _together(errors: Sequence[DataError]) -> DataError:
    """One error that says all of them; what concerns fields of the recipe stays with these."""
    if len(errors) == 1:
        return errors[0]
    if all(isinstance(error, LocatedDataError) for error in errors):
        return LocatedDataError([place for error in errors for place in error.places])  # type: ignore[attr-defined]
    first, *others = errors
    texts = [first.message + (f"\n  help: {first.help}" if first.help and others else "")]
    texts += [error.message + (f"\n  help: {error.help}" if error.help else "") for error in others[:-1]]
    texts.append(errors[-1].message)
    return DataError("\n\nerror: ".join(texts), help=errors[-1].help)
