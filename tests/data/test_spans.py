"""The spans of trained text, under templates of many habits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.kit import build_tokenizer, chat
from ftune.data.chat import load_template
from ftune.data.formats import Conversation
from ftune.data.spans import Rendered, render
from ftune.errors import DataError


def trained(template: str, messages: list[dict[str, Any]], trained_from: int = 0) -> list[str]:
    """The text of each trained span."""
    tokenizer = build_tokenizer(template)
    loaded = load_template(tokenizer)
    assert loaded is not None
    conversation = Conversation(tuple(messages), 0, trained_from)
    found = render(conversation, tokenizer, loaded)
    text, spans = found.text, found.spans
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("template", ["chatml", "marks", "alternates"])
def test_assistant_turns_are_trained_with_their_end(template: str) -> None:
    # the answer "a" also occurs in questions: only the answer's place may be trained
    turns = chat("a b", "a", "a?", "ab\n")
    assert trained(template, turns) == ["a<|im_end|>", "ab\n<|im_end|>"]


def test_white_space_that_a_template_trims_is_not_looked_for() -> None:
    assert trained("trims", chat("q", "  yes \n", "r", "no")) == ["yes<|im_end|>", "no<|im_end|>"]


def test_a_template_without_end_token_ends_a_turn_with_its_white_space() -> None:
    assert trained("bare", chat("q", "yes", "r", "no")) == ["yes\n", "no\n"]


def test_a_system_message_that_moves_is_followed() -> None:
    turns = chat("yes?", "yes", "and?", "no", system="be yes")
    # the first turn is found by substitution, which leaves the template's space before the answer out
    assert trained("moves_system", turns) == ["yes<|eos|>", " no<|eos|>"]


def rendered(template: str, messages: list[dict[str, Any]], turns: list[int] | None = None) -> Rendered:
    tokenizer = build_tokenizer(template)
    loaded = load_template(tokenizer)
    assert loaded is not None
    return render(Conversation(tuple(messages), 0), tokenizer, loaded, turns)


def texts(found: Rendered) -> list[str]:
    return [found.text[start:end] for start, end in found.spans]


@pytest.mark.parametrize("template", ["drops_reasoning", "drops_reasoning_marked"])
@pytest.mark.parametrize("first", ["yes", "<think>Hm.</think>yes"])
def test_a_turn_that_the_model_writes_otherwise_is_not_trained(template: str, first: str) -> None:
    # the model writes a reasoning, perhaps an empty one, before every answer; earlier turns are shown without
    found = rendered(template, chat("q", first, "r", "no"))
    assert texts(found) == ["<think>\n\n</think>\n\nno<|im_end|>"]
    (note,) = found.notes
    assert "earlier assistant turns otherwise than the model writes them" in note
    found = rendered(template, chat("q", "<think>Hm.</think>yes"))
    assert texts(found) == ["<think>\nHm.\n</think>\n\nyes<|im_end|>"]
    assert not found.notes


def test_only_the_turns_asked_for_are_trained_and_told_of() -> None:
    turns = chat("q", "<think>Hm.</think>yes", "r", "no")
    found = rendered("drops_reasoning", turns, [3])
    assert (len(found.spans), found.notes) == (1, ())
    found = rendered("drops_reasoning", turns, [1])
    assert (found.spans, len(found.notes)) == ((), 1)
    assert rendered("marks", turns, []).spans == ()


def test_every_turn_ends_where_it_ends() -> None:
    # as gpt-oss': the last turn ends with another token, which is the one that the model has to write
    found = rendered("returns", chat("q", "a1", "SECRET", "a2", "r", "a3"))
    assert texts(found) == ["<|im_start|>a1", "<|im_start|>a2", "<|im_start|>a3<|eos|>"]
    (note,) = found.notes
    assert "ends earlier assistant turns with <|im_end|>, where the model has to write <|eos|>" in note
    assert rendered("returns", chat("q", "a1")).notes == ()


def test_an_answer_is_trained_behind_its_generation_prompt() -> None:
    # as DeepSeek-R1's: the prompt opens a reasoning that finished turns do not show
    found = rendered("prompts_reasoning", chat("p", "no", "q", "yes"))
    assert texts(found) == ["yes<|im_end|>"]
    assert found.text.endswith("<|im_start|>assistant\n<think>\nyes<|im_end|>\n")
    assert found.text[found.prompt_end :] == "yes<|im_end|>\n"
    told, left_out = found.notes
    assert r"goes on with '<think>\n', which finished turns do not show" in told
    assert "earlier assistant turns otherwise" in left_out
    # as Mistral's: the system message is shown as long as the question is the last message
    found = rendered("shows_system_last", chat("q", "yes", system="be kind"))
    assert found.text == "<|bos|>[INST] be kind\n\nq [/INST] yes<|eos|>"
    assert texts(found) == [" yes<|eos|>"]
    assert found.notes == ()
    # what follows the last answer is no part of its prompt
    found = rendered("shows_system_last", chat("q", "yes", "r", system="be kind"))
    assert found.text == found.whole


@pytest.mark.parametrize("template", ["chatml", "marks", "bare", "returns"])
def test_a_text_begins_with_the_generation_prompt_of_its_last_turn(template: str) -> None:
    turns = chat("q", "yes", "r", "no", "more")
    found = rendered(template, turns)
    prompt = build_tokenizer(template).apply_chat_template(turns[:3], tokenize=False, add_generation_prompt=True)
    assert found.text[: found.prompt_end] == prompt


def test_two_assistant_turns_in_a_row_and_one_at_the_start() -> None:
    turns = [
        {"role": "assistant", "content": "hi"},
        *chat("q", "yes"),
        {"role": "assistant", "content": "no"},
    ]
    for template in ("chatml", "marks"):
        assert [text[:-10] for text in trained(template, turns)] == ["hi", "yes", "no"]


def test_turns_of_the_prompt_are_not_trained() -> None:
    for template in ("chatml", "marks"):
        assert trained(template, chat("q", "yes", "r", "no"), trained_from=3) == ["no<|im_end|>"]


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%+ generation -%}", "{%-generation%}"])
def test_every_spelling_of_the_generation_block_counts(tag: str) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: "
        f"{tag}"
        "{% if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endif %}{% endgeneration %}"
        "{% if m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert trained(template, chat("q", "yes")) == ["yes<|im_end|>"]


def test_a_block_that_marks_nothing_is_an_error_and_not_an_empty_mask() -> None:
    template = (
        "{% for m in messages %}{% if m['content'] == 'never' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="do not enclose what the assistant says"):
        trained(template, chat("q", "yes"))
    # a template that only the probe finds nothing wrong with
    template = template.replace("m['content'] == 'never'", "m['role'] == 'assistant' and m['content'] != 'yes'")
    with pytest.raises(DataError, match="marks nothing of this conversation"):
        trained(template, chat("q", "yes"))


def test_marks_are_those_of_transformers() -> None:
    tokenizer = build_tokenizer("marks")
    turns = chat("hello", "yes\n\nyes", "hell", "yes")
    loaded = load_template(tokenizer)
    assert loaded is not None
    found = render(Conversation(tuple(turns), 0), tokenizer, loaded)
    text, spans = found.text, found.spans
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ours = [any(start < e and s < end for s, e in spans) for start, end in offsets]
    # but for the line break behind the end-of-turn token: marked here, and never reached by generation
    behind = [i for i, mark in enumerate(encoded["assistant_masks"]) if mark and not ours[i]]
    assert [text[slice(*offsets[i])] for i in behind] == ["\n", "\n"]
    assert not any(mine and not mark for mine, mark in zip(ours, encoded["assistant_masks"], strict=True))


contents = st.text(st.sampled_from("a<|im_end>\n é日[/INST]"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "<|" not in text
)


@given(
    st.lists(st.tuples(contents, contents), min_size=1, max_size=3),
    st.sampled_from(["chatml", "trims", "marks"]),
)
def test_the_trained_text_is_what_the_assistant_says(pairs: list[tuple[str, str]], template: str) -> None:
    turns = chat(*(text for pair in pairs for text in pair))
    said = [answer.strip() if template == "trims" else answer for _, answer in pairs]
    assert trained(template, turns) == [f"{answer}<|im_end|>" for answer in said]


@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
def test_answers_are_found_where_the_system_message_moves(pairs: list[tuple[str, str]]) -> None:
    turns = chat(*(text for pair in pairs for text in pair), system="be brief")
    found = trained("moves_system", turns)
    for text, (_, answer) in zip(found, pairs, strict=True):
        # the template puts a space before each answer, which is what the model writes first
        assert text in (f"{answer}<|eos|>", f" {answer}<|eos|>")
