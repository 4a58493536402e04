"""Rendering and the spans of trained text, under templates of many habits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.kit import TEMPLATES, build_tokenizer, chat
from ftune.data.chat import generation_prompt, load_template, render
from ftune.data.formats import Conversation
from ftune.errors import DataError


def trained(template: str, messages: list[dict[str, Any]], trained_from: int = 0) -> list[str]:
    """The text of each trained span."""
    tokenizer = build_tokenizer(template)
    loaded = load_template(tokenizer)
    assert loaded is not None
    conversation = Conversation(tuple(messages), 0, trained_from)
    text, spans = render(conversation, tokenizer, loaded)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("template", ["chatml", "marks", "alternates", "prompts_reasoning"])
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


def test_plain_answers_survive_a_template_for_reasoning() -> None:
    turns = chat("q", "yes", "r", "no")
    assert trained("drops_reasoning", turns) == ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]
    assert trained("drops_reasoning", chat("q", "<think>Hm.</think>yes")) == ["<think>\nHm.\n</think>\n\nyes<|im_end|>"]


def test_reasoning_that_a_template_drops_is_refused() -> None:
    with pytest.raises(DataError, match=r"messages\[1\] differently") as caught:
        trained("drops_reasoning", chat("q", "<think>Hm.</think>yes", "r", "no"))
    assert "{% generation %}" in (caught.value.help or "")


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
    with pytest.raises(DataError, match="marks nothing"):
        trained(template, chat("q", "yes"))


def test_marks_are_those_of_transformers() -> None:
    tokenizer = build_tokenizer("marks")
    turns = chat("hello", "yes\n\nyes", "hell", "yes")
    loaded = load_template(tokenizer)
    assert loaded is not None
    text, spans = render(Conversation(tuple(turns), 0), tokenizer, loaded)
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ours = [any(start < e and s < end for s, e in spans) for start, end in offsets]
    # but for the line break behind the end-of-turn token: marked here, and never reached by generation
    behind = [i for i, mark in enumerate(encoded["assistant_masks"]) if mark and not ours[i]]
    assert [text[slice(*offsets[i])] for i in behind] == ["\n", "\n"]
    assert not any(mine and not mark for mine, mark in zip(ours, encoded["assistant_masks"], strict=True))


def test_a_template_file_replaces_the_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATES["bare"])
    tokenizer = build_tokenizer("chatml")
    loaded = load_template(tokenizer, str(file))
    assert loaded is not None
    conversation = Conversation(tuple(chat("q", "yes")), 0)
    assert render(conversation, tokenizer, loaded)[0] == "user: q\nassistant: yes\n"
    assert generation_prompt(conversation, 1, tokenizer, loaded) == "user: q\nassistant: "
    assert load_template(build_tokenizer(None)) is None


def test_a_template_runs_in_the_sandbox() -> None:
    with pytest.raises(DataError, match="SecurityError"):
        trained("{{ messages.__class__.__mro__ }}", chat("q", "yes"))


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
