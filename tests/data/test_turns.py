"""Turns as other tools write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.kit import chat
from ftune.data.formats import convert, resolve_format
from ftune.data.sources import Rows, load_rows
from ftune.data.turns import CALL_TEXT, Misfit, messages_in
from ftune.errors import DataError
from ftune.recipe.schema import DataSource

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.fixture
def rows(write: Callable[..., Path]) -> Callable[..., Rows]:
    return lambda *of: load_rows(DataSource(path=str(write(list(of)))))


def one(rows: Rows, asked: str = "auto", *, chat_template: bool = True) -> Any:
    (record,) = convert(rows, resolve_format(rows, asked), chat_template=chat_template)
    return record


def said(*turns: Any) -> list[dict[str, Any]]:
    return messages_in({"messages": list(turns)}, "messages")


def test_a_call_of_a_tool_is_the_same_in_every_form() -> None:
    arguments = {"name": "weather", "arguments": {"city": "Oslo"}}
    forms: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "function_call": arguments},
        {"from": "function_call", "value": json.dumps(arguments)},
        {"from": "function_call", "value": json.dumps([arguments])},
        {"role": "tool_call", "content": json.dumps(arguments)},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "gpt", "value": "", "tool_calls": [CALL]},
    ]
    for form in forms:
        (message,) = said(form)
        # a call that the row has as text alone may stay text, where a template shows no calls
        text = message.pop(CALL_TEXT, None)
        assert text is None or text in (form.get("value"), form.get("content"))
        assert (text is None) == (form.get("from") != "function_call" and form.get("role") != "tool_call")
        assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}, form


def test_sharegpt_with_a_function_call_and_an_observation(rows: Callable[..., Rows]) -> None:
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3 degrees"},
    ]
    messages = one(rows({"conversations": turns})).messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    assert messages[2] == {"role": "tool", "content": "3"}


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("GPT", "assistant"), ("model", "assistant"), ("Chatbot", "assistant"), ("ai", "assistant")],
)
def test_a_role_is_known_by_other_tools_names_under_either_key(name: str, role: str) -> None:
    for turn in ({"role": name, "content": "x"}, {"from": name, "value": "x"}, {"role": name, "value": "x"}):
        assert said(turn) == [{"role": role, "content": "x"}]


def test_every_other_key_of_a_turn_is_kept_and_nulls_are_not() -> None:
    kept = {"weight": 0, "train": False, "name": "f", "reasoning_content": "hm"}
    for turn in (
        {"from": "gpt", "value": "x", **kept},
        {"role": "assistant", "content": "x", "tool_calls": None, **kept},
    ):
        assert said(turn) == [{"role": "assistant", "content": "x", **kept}]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"from": "function_call", "value": "weather()"}, 'expected {"name": ..., "arguments": {...}} as JSON'),
        ({"from": "function_call", "value": "[]"}, "as JSON"),
        ({"from": "function_call", "value": '{"city": "Oslo"}'}, "found a call with the keys city"),
        ({"from": "narrator", "value": "x"}, "expected one of system, developer, user, assistant, tool"),
        ({"role": "user", "from": "gpt", "content": "x"}, "both `role` and `from`"),
        ({"role": "user", "content": "x", "value": "y"}, "both `content` and `value`"),
        ({"role": "assistant", "content": "x", "tool_calls": "f"}, "expected a list of calls"),
        ({"user": "x"}, "expected {role, content} or {from, value}"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "ftune trains on text only: remove the",
        ),
        ({"role": "user", "content": [{"type": "image", "text": None}]}, "[0]: found a part of type 'image'; ftune"),
        ({"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}, "message's `reasoning_content`"),
        ({"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}, "into the message's `tool_calls`"),
        ({"role": "user", "content": [{"type": "tool_result", "content": "3"}]}, "{role: tool, content: its text}"),
        ({"role": "user", "content": [{"text": "x", "y": 1}]}, "found the keys text, y; expected {type: text, text: "),
        ({"role": "tool", "content": {"degrees": 3}}, "found an object; expected a string (its JSON, say)"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "'text'; expected {type: text, text: a string}"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "the refusal's text as `content`"),
        ({"role": "assistant", "content": "", "refusal": "No."}, "the refusal's text as `content`"),
        ({"role": "assistant", "content": " "}, "write its answer, or leave out the row"),
    ],
)
def test_a_turn_that_is_none_says_where(turn: dict[str, Any], expected: str) -> None:
    with pytest.raises(Misfit) as caught:
        said(turn)
    assert str(caught.value).startswith("`messages`[0]")
    assert expected in str(caught.value)


@pytest.mark.parametrize("part", [{"text": "x"}, {"type": "text", "text": "x"}, {"type": "output_text", "text": "x"}])
def test_parts_of_text_are_joined(part: dict[str, str]) -> None:
    assert said({"role": "user", "content": [part, part]}) == [{"role": "user", "content": "xx"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": " "}, "found a string of white space; fill it in, or leave out the row"),
        ({"prompt": "a", "completion": ""}, "found an empty string; fill it in, or leave out the row"),
        ({"prompt": "a", "completion": None}, "found null; fill it in, or leave out the row"),
        ({"prompt": "a", "completion": ["b"]}, "a name with dots (`a.b.0`)"),
        ({"messages": chat("a")}, "found the roles user: add the answer, or leave out the row"),
        ({"messages": chat("a", "b"), "tools": ["f"]}, "`tools`[0]: found the string 'f'; expected a JSON schema"),
    ],
)
def test_a_value_that_does_not_fit_says_what_to_write(rows: Callable[..., Rows], row: Any, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        one(rows(row))
    assert expected in caught.value.message


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "dialog", "dialogue"])
def test_a_conversation_may_be_json_in_a_string(rows: Callable[..., Rows], column: str) -> None:
    record = one(rows({column: json.dumps(chat("a", "b"))}))
    assert [(m["role"], m["content"]) for m in record.messages] == [("user", "a"), ("assistant", "b")]


def test_a_list_as_python_prints_it_says_how_to_save_it(rows: Callable[..., Rows]) -> None:
    with pytest.raises(DataError, match="save as .jsonl or .parquet instead"):
        one(rows({"messages": str(chat("a", "b"))}))


def test_alpaca_history_is_earlier_turns(rows: Callable[..., Rows]) -> None:
    row = {"instruction": "And its color?", "input": "", "output": "Red.", "history": [["Name a fruit.", "Apple."]]}
    for history in (row["history"], json.dumps(row["history"])):
        record = one(rows({**row, "history": history, "system": "Be brief."}))
        assert [m["content"] for m in record.messages] == [
            "Be brief.",
            "Name a fruit.",
            "Apple.",
            "And its color?",
            "Red.",
        ]
    for none in ([], None, ""):
        assert len(one(rows({**row, "history": none})).messages) == 2
    with pytest.raises(DataError, match="`history`: earlier turns need a chat template"):
        one(rows(row), chat_template=False)
    for broken in ([["a"]], [["a", None]], {"a": "b"}, [["a", " "]]):
        with pytest.raises(DataError, match="data.jsonl:1: `history`"):
            one(rows({**row, "history": broken}))


def test_a_system_column_is_the_first_turn_of_every_conversation(rows: Callable[..., Rows]) -> None:
    for row in ({"messages": chat("hi", "salut")}, {"prompt": chat("hi"), "completion": chat("", "salut")[1:]}):
        record = one(rows({"system": "Answer in French.", **row}))
        assert [m["content"] for m in record.messages] == ["Answer in French.", "hi", "salut"]
    assert one(rows({"prompt": chat("hi"), "completion": chat("", "b")[1:], "system": "S"})).trained_from == 2
    said_twice = {"system": "S", "messages": chat("hi", "salut", system="S")}
    assert len(one(rows(said_twice)).messages) == 3
    with pytest.raises(DataError, match="the row has a system turn as well"):
        one(rows({**said_twice, "system": "T"}))


def test_a_table_does_not_add_nulls_to_arguments(write: Callable[..., Path]) -> None:
    from datasets import Dataset

    def call(**arguments: Any) -> dict[str, Any]:
        turn = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
        return {"messages": [{"role": "user", "content": "x"}, turn], "note": None}

    path = write("", "t.parquet")
    Dataset.from_list([call(city="Oslo"), call(days=3)]).to_parquet(str(path))
    rows = [row for _, row in load_rows(DataSource(path=str(path)))]
    found = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows]
    assert found == [{"city": "Oslo"}, {"days": 3}]
    assert rows[0]["note"] is None
