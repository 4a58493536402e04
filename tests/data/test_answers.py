"""Answers taken apart: reasoning, calls, JSON, and what the data's answer is as a template renders it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftune.data.answers import NO_JSON, calls_of, json_in, read_answer, same_value
from ftune.data.sources import load_rows
from ftune.data.splits import GenerationItem
from ftune.data.tokenize import generation_items
from ftune.recipe.schema import DataSource, DataSpec

SPECIALS = ("<|im_end|>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "[THINK]", "[/THINK]", "<|call|>")


@pytest.mark.parametrize(
    "raw",
    [
        "4",
        " 4 <|im_end|>",
        "<think>two and two</think>\n\n4",
        "two and two</think>4",
        "<think></think>4",
        "<thinking>hm\nhm</thinking>4",
        "[THINK]two[/THINK]4",
        "<|channel|>analysis<|message|>two<|end|><|start|>assistant<|channel|>final<|message|>4",
        "<|channel|>final<|message|>4",
    ],
)
def test_reasoning_is_not_the_answer(raw: str) -> None:
    assert read_answer(raw, SPECIALS).text == "4"


def test_reasoning_that_never_ends_has_no_answer() -> None:
    assert read_answer("<think>two and", SPECIALS).text == ""
    assert read_answer("<|channel|>analysis<|message|>two and", SPECIALS).text == ""
    assert read_answer("<think>two and", SPECIALS).whole == "<think>two and"


@pytest.mark.parametrize(
    "raw",
    [
        '<tool_call>{"name": "get", "arguments": {"x": [1, 2]}}</tool_call>',
        '<tool_call>\n{"arguments": {"x": [1, 2.0]}, "name": "get"}\n</tool_call>',
        '<think>I call {"name": "other", "arguments": {}}</think>{"name": "get", "parameters": {"x": [1, 2]}}',
        '[TOOL_CALLS][{"name": "get", "arguments": {"x": [1, 2]}}]',
        '[TOOL_CALLS]get[ARGS]{"x": [1, 2]}',
        '{"type": "function", "function": {"name": "get", "arguments": "{\\"x\\": [1, 2]}"}}',
        "<function=get>\n<parameter=x>\n[1, 2]\n</parameter>\n</function>",
        '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"x": [1, 2]}<|call|>',
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{"x": [1, 2]}\n```<｜tool▁call▁end｜>',
        'Let me look.\n<tool_call>{"name": "get", "arguments": {"x": [1, 2]}}',
    ],
)
def test_calls_as_templates_write_them(raw: str) -> None:
    assert same_value(read_answer(raw, SPECIALS).calls, (("get", {"x": [1, 2]}),))


def test_what_is_no_call() -> None:
    for raw in ("hello", '{"name": "Bob"}', "[1, 2]", "{", '{"arguments": {}}'):
        assert read_answer(raw, SPECIALS).calls == ()


def test_calls_of_a_row_in_both_forms() -> None:
    call: dict[str, Any] = {"name": "f", "arguments": {"x": 1}}
    text = {"name": "f", "arguments": '{"x": 1}'}
    expected = (("f", {"x": 1}),)
    for form in (call, text, {"type": "function", "function": call}, {"type": "function", "function": text}):
        assert calls_of({"tool_calls": [form]}) == expected
    assert calls_of({"content": "x"}) == ()


def test_equal_as_values() -> None:
    assert same_value({"a": 1, "b": None}, {"b": None, "a": 1.0})
    assert not same_value({"a": 1}, {"a": True})
    assert not same_value({"a": None}, {})
    assert json_in("null") is None
    assert json_in("") is NO_JSON
    assert json_in("say\n```json\n[1]\n```") == [1]


TOOL_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + ({'name': c.function.name, 'arguments': c.function.arguments} "
    "| tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def items(path: Path, template: str, *answers: dict[str, Any]) -> list[GenerationItem]:
    file, jinja = path / "rows.jsonl", path / "template.jinja"
    jinja.write_text(template)
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant"} | answer]} for answer in answers]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec(train=DataSource(path=str(file)), chat_template=str(jinja))
    return generation_items(load_rows(spec.train), tiny.tokenizer(), spec, "messages")


def test_the_reference_of_a_tool_call_is_what_the_template_renders(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    (found,) = items(tmp_path, TOOL_TEMPLATE, {"content": None, "tool_calls": [call]})
    assert found.reference.text == '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    assert found.reference.calls == (("f", {"x": 1}),)


def test_json_that_is_no_call_is_not_taken_for_one(tmp_path: Path) -> None:
    (found,) = items(tmp_path, tiny.CHATML, {"content": '{"name": "Bob", "arguments": {"age": 4}}'})
    assert found.reference.calls == ()


def test_the_reference_ends_before_the_end_of_turn(tmp_path: Path) -> None:
    found = items(tmp_path, tiny.CHATML, {"content": "first\nsecond"}, {"content": "<think>hm</think>\n4"})
    assert [item.reference.text for item in found] == ["first\nsecond", "4"]
