"""What `ftune validate --data` prints of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from data.kit import chat
from ftune.data.show import show_examples
from ftune.data.splits import Split
from ftune.data.tokenize import load_splits
from ftune.recipe.schema import DataSpec


@pytest.fixture
def split(write: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Split:
    path = write([{"messages": chat("é?", "日!", "c\x1b[31m", "d\u202e")}, {"messages": chat("x" * 2000, "y")}])
    monkeypatch.chdir(path.parent)
    return load_splits(DataSpec(train=path.name, max_length=4096), tokenizer, seed=0).train


def test_trained_spans_are_bracketed(split: Split, tokenizer: PreTrainedTokenizerFast) -> None:
    assert show_examples(split, tokenizer, 1, color=False) == (
        "format messages: 1 of 2 examples; ⟦trained⟧ masked\n\n"
        "--- data.jsonl:1: 59 tokens, 10 trained (17%)\n"
        "<|im_start|>user\né?<|im_end|>\n<|im_start|>assistant\n⟦日!<|im_end|>⟧\n"
        "<|im_start|>user\nc\\x1b[31m<|im_end|>\n<|im_start|>assistant\n⟦d\\u202e<|im_end|>⟧\n"
    )


def test_colour_sets_trained_tokens_apart(split: Split, tokenizer: PreTrainedTokenizerFast) -> None:
    shown = show_examples(split, tokenizer, 1, color=True)
    assert "\x1b[1;32m日!<|im_end|>\x1b[0m" in shown
    assert "⟦" not in shown
    # the data's own escape sequence does not reach the terminal
    assert "\x1b[31m" not in shown


def test_long_runs_lose_their_middle(split: Split, tokenizer: PreTrainedTokenizerFast) -> None:
    shown = show_examples(split, tokenizer, 3, color=False)
    assert "characters … x" in shown
    assert shown.endswith("⟦y<|im_end|>⟧\n")
    assert len(shown) < 1500
