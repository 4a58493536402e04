"""What a row says of which of its turns are trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.kit import build_tokenizer, chat
from ftune.data.chat import load_template
from ftune.data.encode import Encoder
from ftune.data.encoded import Part, RowError
from ftune.data.examples import IGNORE
from ftune.data.formats import Conversation
from ftune.data.tokenize import load_splits
from ftune.data.weights import NOT_THE_ASSISTANTS, UNTRAINED, weighed
from ftune.errors import DataError
from ftune.recipe.schema import DataSpec

TOKENIZER = build_tokenizer()


def part(messages: list[dict[str, Any]], train_on: str = "assistant", trained_from: int = 0) -> Part:
    encoder = Encoder(TOKENIZER, load_template(TOKENIZER), train_on=train_on, max_length=1000, too_long="error")
    return encoder.encode([Conversation(tuple(messages), 0, trained_from)])


def trained(messages: list[dict[str, Any]], train_on: str = "assistant", trained_from: int = 0) -> str:
    (example,) = part(messages, train_on, trained_from).examples
    text: str = TOKENIZER.decode(example.labels[example.labels != IGNORE])
    return text


def turns(key: str, first: Any, second: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chat("a", "BAD", "b", "GOOD")
    found[1][key] = first
    found[3][key] = second
    return found


@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [
        ("weight", 0, 1),
        ("weight", 0.0, 1.0),
        ("weight", "0", "1"),
        ("train", False, True),
        ("training", False, True),
        ("trainable", "false", "true"),
        ("loss", False, True),
        ("loss_mask", 0, 1),
        ("mask", True, False),
        ("masked", True, False),
        ("train", False, None),
    ],
)
def test_a_turn_that_is_not_to_be_trained_is_not(key: str, no: Any, yes: Any) -> None:
    assert trained(turns(key, no, yes)) == "GOOD<|im_end|>"
    assert trained(turns(key, yes, yes)) == "BAD<|im_end|>GOOD<|im_end|>"
    # the key is no part of what is rendered
    with_key, _, _ = weighed(Conversation(tuple(turns(key, no, yes)), 0), "assistant")
    assert with_key.messages == tuple(chat("a", "BAD", "b", "GOOD"))


def test_weights_count_in_a_completion_too() -> None:
    found: list[dict[str, Any]] = chat("a", "CONTEXT", "b", "BAD", "c", "GOOD")
    found[3]["weight"] = 0
    assert trained(found, trained_from=3) == "GOOD<|im_end|>"


def test_the_last_turn_alone_is_trained_when_asked_for() -> None:
    assert trained(chat("a", "BAD", "b", "GOOD"), "last") == "GOOD<|im_end|>"
    assert trained(chat("a", "BAD", "b", "GOOD", "c"), "last") == "GOOD<|im_end|>"


def test_a_row_without_a_turn_to_train_is_counted_and_told() -> None:
    found = part(turns("weight", 0, 0))
    assert (len(found.examples), found.no_target, dict(found.notes)) == (0, 1, {UNTRAINED: 1})
    found = part(turns("weight", 1, 0), "last")
    assert (len(found.examples), dict(found.notes)) == (0, {UNTRAINED: 1})


def test_a_user_who_asks_to_be_trained_is_told() -> None:
    found: list[dict[str, Any]] = chat("a", "yes")
    found[0]["weight"] = 1
    assert dict(part(found).notes) == {NOT_THE_ASSISTANTS: 1}
    found[0]["weight"] = 0
    assert dict(part(found).notes) == {}


@pytest.mark.parametrize(
    ("messages", "train_on", "message"),
    [
        (turns("weight", 0.5, 1), "assistant", r"messages\[1\].weight: found 0.5: a turn is trained .* or not"),
        (turns("weight", 1, 2), "assistant", r"messages\[3\].weight: found 2"),
        (turns("train", "never", True), "assistant", r"messages\[1\].train: found 'never'"),
        (turns("mask", 1, 0), "assistant", r"messages\[1\].mask: 1 may mean"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0, "train": True}],
            "assistant",
            "`weight: 0` and `train: True` contradict",
        ),
        (turns("weight", 0, 1), "all", r"messages\[1\] is not to be trained .* trains every token"),
    ],
)
def test_what_cannot_be_honoured_is_refused(messages: list[dict[str, Any]], train_on: str, message: str) -> None:
    with pytest.raises(RowError) as caught:
        part(messages, train_on)
    assert re.search(message, caught.value.message)
    assert caught.value.help


def test_rows_that_teach_nothing_say_why(write: Callable[..., Path]) -> None:
    path = write([{"messages": turns("weight", 0, 0)}, {"messages": turns("train", False, False)}])
    with pytest.raises(DataError, match=r"nothing to train on(.|\n)*2 of 2 rows: every assistant turn is set"):
        load_splits(DataSpec(train=str(path)), TOKENIZER, seed=0)
