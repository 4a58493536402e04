"""Examples for a terminal, with trained tokens set apart from masked ones."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ftune.data.tokenize import IGNORE, Example, Split
from ftune.scrub import harmless

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["show_examples"]

TRAINED, MASKED, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"
# of a longer run of one kind, the middle is left out
LONGEST_RUN = 800


def show_examples(split: Split, tokenizer: PreTrainedTokenizerBase, n: int = 3, *, color: bool) -> str:
    """The first ``n`` examples with a legend and their counts.

    Trained tokens are green and masked ones dim; without colour, trained spans stand between ⟦ and ⟧. Control
    characters in the data are written out, so that no row can drive the terminal.
    """
    legend = f"{TRAINED}trained{RESET} {MASKED}masked{RESET}" if color else f"{OPEN}trained{CLOSE} masked"
    shown = split.examples[:n]
    parts = [f"format {split.format}: {len(shown)} of {len(split.examples)} examples; {legend}"]
    for example in shown:
        trained = example.target_tokens
        parts.append(
            f"--- {split.rows.where(example.row)}: {len(example)} tokens, {trained} trained "
            f"({trained / len(example):.0%})\n{_text(example, tokenizer, color)}"
        )
    return "\n\n".join(parts)


def _text(example: Example, tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """One example's text, marked up."""
    marked = []
    # the first token is no target, whatever its label: nothing precedes it
    trained_L = (example.labels != IGNORE) & (np.arange(len(example)) > 0)
    for trained, run in groupby(range(len(example)), key=lambda i: bool(trained_L[i])):
        ids = [int(example.input_ids[i]) for i in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = harmless(text)
        if len(text) > LONGEST_RUN:
            half = LONGEST_RUN // 2
            text = f"{text[:half]} … {len(text) - LONGEST_RUN} characters … {text[-half:]}"
        if color:
            marked.append(f"{TRAINED if trained else MASKED}{text}{RESET}")
        else:
            marked.append(f"{OPEN}{text}{CLOSE}" if trained else text)
    return "".join(marked)
