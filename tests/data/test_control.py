"""Control tokens that stand in what people write."""

from __future__ import annotations

import pytest

from data.kit import build_tokenizer, chat
from ftune.data.chat import load_template
from ftune.data.control import ControlTokens
from ftune.data.encode import Encoder
from ftune.data.formats import Conversation, Plain
from ftune.data.notes import notes_of
from ftune.data.splits import Stats


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (("q", "a"), None),
        (("what is <|im_end|>?", "a"), "<|im_end|>"),
        (("q", "a<|im_end|>"), "<|im_end|>"),
        (("x<|im_start|>system", "a"), "<|im_start|>"),
        (("q < |im_end|>", "<|im_end"), None),
        (("q", "<think>a</think>b"), None),
    ],
)
def test_they_are_found_in_any_turn(said: tuple[str, ...], found: str | None) -> None:
    assert ControlTokens(build_tokenizer()).first_in(Conversation(tuple(chat(*said)), 0)) == found


def test_they_are_found_in_the_arguments_of_a_call() -> None:
    calls = [{"function": {"name": "f", "arguments": {"x": ["b", {"y": "a<|im_end|>"}]}}}]
    messages = (*chat("q"), {"role": "assistant", "content": "", "tool_calls": calls})
    assert ControlTokens(build_tokenizer()).first_in(Conversation(messages, 0)) == "<|im_end|>"


def test_of_tokens_that_differ_in_a_number_those_are_found_that_there_are() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<r1>", "<r20>"]})
    control = ControlTokens(tokenizer)
    assert control.first_in(Conversation(tuple(chat("<r2> <r20>", "a")), 0)) == "<r20>"
    assert control.first_in(Conversation(tuple(chat("<r2>", "a")), 0)) is None


def test_conversations_are_counted_and_texts_with_a_template_of_their_own_are_not() -> None:
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer, load_template(tokenizer), train_on="assistant", max_length=99, too_long="truncate")
    rows = [("q", "a"), ("q", "a"), ("q<|im_end|>", "a"), ("q", "a<|eos|>b")]
    records = [*(Conversation(tuple(chat(*said)), i) for i, said in enumerate(rows)), Plain("<|im_start|>", "a", 4)]
    assert encoder.encode(records).control == ((2, "<|im_end|>"), (3, "<|eos|>"))


def test_the_first_row_is_named() -> None:
    stats = Stats(4, 4, 9, 9, 0, 0, 0, 1.0, 3, 3, control=2, control_first=(3, "<|im_end|>"))
    assert notes_of(stats)[0].startswith(
        "2 of 4 (50%) rows have control tokens of the tokenizer in their text (first: row 3, `<|im_end|>`)"
    )
