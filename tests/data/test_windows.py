"""Long texts in windows: no token lost, none learned twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.kit import build_tokenizer, chat
from ftune.data.examples import IGNORE
from ftune.data.notes import notes_of
from ftune.data.sources import load_rows
from ftune.data.splits import Split
from ftune.data.tokenize import generation_items, load_splits
from ftune.data.windows import windows
from ftune.errors import DataError
from ftune.recipe.schema import DataSource, DataSpec

Load = Callable[..., Split]


@given(st.integers(1, 60), st.integers(3, 20), st.lists(st.integers(100, 200), max_size=2), st.booleans())
def test_every_token_is_learned_once(length: int, max_length: int, lead: list[int], leads: bool) -> None:
    document = [*(lead if leads else []), *range(length)]
    ids, trained = np.array(document, dtype=np.int32), np.array([token < 100 for token in document])
    learned: list[int] = []
    for window, mask in windows(ids, trained, max_length, lead):
        assert len(window) == len(mask) <= max_length
        assert mask[1:].any() or len(document) <= max_length
        learned += window[1:][mask[1:]].tolist()
        if leads and lead and max_length > len(lead) + 1:
            assert window[: len(lead)].tolist() == lead
    # the first token of all has nothing before it
    first = 0 if leads and lead else 1
    assert learned == list(range(first, length))


@pytest.fixture
def load(write: Callable[..., Path]) -> Load:
    def load(rows: list[dict[str, object]], **settings: object) -> Split:
        spec = DataSpec(train=DataSource(path=str(write(rows))), **settings)
        return load_splits(spec, build_tokenizer(adds_bos=True), seed=0).train

    return load


def test_a_long_text_is_split_by_default(load: Load) -> None:
    rows = [{"text": "ab" * 50}, {"text": "q"}]
    split = load(rows, max_length=16)
    lengths = [len(example) for example in split.examples]
    assert lengths[:-2] == [16] * 7
    assert [example.row for example in split.examples] == [0] * 8 + [1]
    said = [token for example in split.examples for token in example.labels if token != IGNORE]
    assert build_tokenizer().decode(said) == "ab" * 50 + "<|eos|>q<|eos|>"
    stats = split.stats
    assert (stats.rows, stats.examples, stats.split, stats.lost_tokens, stats.truncated) == (2, 9, 1, 0, 0)
    assert stats.target_tokens == 101 + 2
    assert stats.ends_with_eos == 1
    assert notes_of(stats) == []


def test_what_is_lost_is_told_in_tokens(load: Load) -> None:
    rows = [{"text": "a" * 30}, {"text": "q"}]
    stats = load(rows, max_length=8, too_long="truncate").stats
    # 32 tokens with both ends, of which 8 are kept
    assert (stats.lost_tokens, stats.lost_target_tokens, stats.cut_answers) == (24, 24, 1)
    assert notes_of(stats) == [
        "1 of 2 (50%) examples are cut at data.max_length: 24 tokens (69%) are lost, 24 (73%) of those in the loss",
        "1 of 2 (50%) examples lose the end of their answer, and with it the token that ends the turn",
    ]
    stats = load(rows, max_length=8, too_long="skip").stats
    assert (stats.lost_tokens, stats.lost_target_tokens) == (32, 31)
    assert notes_of(stats)[0].startswith("1 of 2 (50%) rows are left out, longer than data.max_length: 32 tokens")
    # a prompt that is too long loses what it has behind the cut, and its answer with it
    stats = load([{"prompt": "a" * 30, "completion": "a"}, {"prompt": "q", "completion": "a"}], max_length=8).stats
    assert (stats.lost_tokens, stats.lost_target_tokens, stats.no_target) == (25, 2, 1)
    assert notes_of(stats) == [
        "1 examples are left out: nothing in them is trained on: 25 tokens (86%) are lost, 2 (50%) of those in the loss"
    ]


@pytest.mark.parametrize("row", [{"prompt": "q", "completion": "a" * 80}, {"messages": chat("q", "a" * 80)}])
def test_an_answer_is_not_split_from_its_prompt(load: Load, row: dict[str, object]) -> None:
    assert load([row], max_length=60).stats.truncated == 1
    with pytest.raises(DataError, match="too_long: split is for the format `text`"):
        load([row], max_length=60, too_long="split")


def test_prompts_are_read_whatever_becomes_of_long_texts(write: Callable[..., Path]) -> None:
    rows = load_rows(DataSource(path=str(write([{"prompt": "q", "completion": "a"}]))))
    spec = DataSpec(train="unused", too_long="split")
    (item,) = generation_items(rows, build_tokenizer(), spec, "prompt_completion")
    assert build_tokenizer().decode(item.prompt_ids) == "q"
