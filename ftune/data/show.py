"""Examples for a terminal, with trained tokens set apart from masked ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ftune.data.splits import Split, Splits
from ftune.data.tokenize import IGNORE, Example
from ftune.errors import DataError
from ftune.scrub import harmless

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["show_examples", "show_row"]

TRAINED, MASKED, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"
# of a longer run of one kind, the middle is left out
LONGEST_RUN = 800


def show_examples(split: Split, tokenizer: PreTrainedTokenizerBase, n: int = 3, *, color: bool) -> str:
    """The first ``n`` examples with a legend and their counts.

    Trained tokens are green and masked ones dim; without colour, trained spans stand between ⟦ and ⟧. Control
    characters in the data are written out, so that no row can drive the terminal.
    """
    shown = split.examples[:n]
    head = f"format {split.format}: {len(shown)} of {len(split.examples)} examples; {_legend(color)}"
    return "\n\n".join([head, *_shown(shown, split, tokenizer, color, LONGEST_RUN)])


def show_row(splits: Splits, tokenizer: PreTrainedTokenizerBase, number: int, *, color: bool) -> str:
    """A row of the training source as it is trained, or held out; all of it.

    Args:
        splits: The examples.
        tokenizer: The one that made them.
        number: The row, counted from 1 as messages count rows.
        color: Use ANSI colours.

    Raises:
        DataError: There is no such row, or nothing of it is trained on.
    """
    rows = splits.train.rows
    if not 1 <= number <= len(rows.source):
        raise DataError(f"there is no row {number}: {rows.origin[0]} has {len(rows.source):,}")
    # without a source of their own, held-out rows come from the training rows
    same = splits.eval is not None and splits.eval.rows.source is rows.source
    for split, what in ((splits.train, "trained on"), *(((splits.eval, "held out"),) if same else ())):
        assert split is not None
        found = [split.examples[int(at)] for at in np.flatnonzero(split.examples.rows == number - 1)]
        if found:
            parts = f" in {len(found)} parts" if len(found) > 1 else ""
            head = f"format {split.format}: row {number}, {what}{parts}; {_legend(color)}"
            return "\n\n".join([head, *_shown(found, split, tokenizer, color, None)])
    raise DataError(
        f"{rows.where(number - 1)}: nothing of row {number} is trained on: it is longer than data.max_length, or no "
        "trained token is left in it",
        help="raise data.max_length, or change data.too_long",
    )


def _legend(color: bool) -> str:
    return f"{TRAINED}trained{RESET} {MASKED}masked{RESET}" if color else f"{OPEN}trained{CLOSE} masked"


def _shown(
    examples: Sequence[Example], split: Split, tokenizer: PreTrainedTokenizerBase, color: bool, longest: int | None
) -> list[str]:
    """Each example with its place and its counts."""
    return [
        f"--- {split.rows.where(example.row)}: {len(example)} tokens, {example.target_tokens} trained "
        f"({example.target_tokens / len(example):.0%})\n{_text(example, tokenizer, color, longest)}"
        for example in examples
    ]


def _text(example: Example, tokenizer: PreTrainedTokenizerBase, color: bool, longest: int | None) -> str:
    """One example's text, marked up."""
    marked = []
    # the first token is no target, whatever its label: nothing precedes it
    trained_L = (example.labels != IGNORE) & (np.arange(len(example)) > 0)
    for trained, run in groupby(range(len(example)), key=lambda i: bool(trained_L[i])):
        ids = [int(example.input_ids[i]) for i in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = harmless(text)
        if longest is not None and len(text) > longest:
            half = longest // 2
            text = f"{text[:half]} … {len(text) - longest} characters … {text[-half:]}"
        if color:
            marked.append(f"{TRAINED if trained else MASKED}{text}{RESET}")
        else:
            marked.append(f"{OPEN}{text}{CLOSE}" if trained else text)
    return "".join(marked)
