"""Detection of formats and conversion of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.kit import chat
from ftune.data.formats import Conversation, Plain, convert, detect_format, resolve_format
from ftune.data.sources import Rows, load_rows
from ftune.errors import DataError
from ftune.recipe.schema import DataSource


@pytest.fixture
def rows(write: Callable[..., Path]) -> Callable[..., Rows]:
    return lambda *of: load_rows(DataSource(path=str(write(list(of)))))


def one(rows: Rows, asked: str = "auto", *, chat_template: bool = True) -> Any:
    (record,) = convert(rows, resolve_format(rows, asked), chat_template=chat_template)
    return record


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": chat("a", "b")}, "messages"),
        ({"conversation": chat("a", "b"), "id": 3}, "messages"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b", "text": "rendered"}, "alpaca"),
        ({"prompt": "a", "messages": chat("a", "b")}, "messages"),
        ({"text": "a"}, "text"),
        ({"conversation": 12, "text": "a"}, "text"),
        ({"dialog": "d-7", "prompt": "a", "completion": "b"}, "prompt_completion"),
    ],
)
def test_the_format_is_detected(row: dict[str, Any], expected: str) -> None:
    assert detect_format(list(row), row) == expected


def test_no_format_lists_what_there_is_and_what_is_expected() -> None:
    with pytest.raises(DataError, match="`question`, `answer`") as caught:
        detect_format(["question", "answer"], {"question": "a", "answer": "b"})
    for name in ("messages", "sharegpt", "prompt_completion", "alpaca", "text"):
        assert f"\n  {name}: " in caught.value.message


def test_messages_keep_what_they_carry_and_join_text_parts(rows: Callable[..., Rows]) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "name": "f"},
        {"role": "assistant", "content": "three", "tool_calls": None},
        {"role": "assistant", "content": "indeed"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = one(rows({"messages": turns, "tools": tools}))
    assert record == Conversation(
        (
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3", "name": "f"},
            {"role": "assistant", "content": "three"},
            {"role": "assistant", "content": "indeed"},
        ),
        row=0,
        tools=tuple(tools),
    )


def test_sharegpt_names_become_roles(rows: Callable[..., Rows]) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "tool", "value": "c"}]
    record = one(rows({"conversations": turns, "system": "be brief", "tools": "[]"}))
    assert [(m["role"], m["content"]) for m in record.messages] == [
        ("system", "be brief"),
        ("user", "a"),
        ("assistant", "b"),
        ("tool", "c"),
    ]


def test_prompt_and_completion_as_strings_or_messages(rows: Callable[..., Rows]) -> None:
    assert one(rows({"prompt": "a", "completion": "b"})) == Plain("a", "b", 0)
    record = one(rows({"prompt": chat("a", "b", "c"), "completion": chat("x", "d")[1:]}))
    assert [m["content"] for m in record.messages] == ["a", "b", "c", "d"]
    assert record.trained_from == 3


def test_alpaca_becomes_turns_or_its_classic_prompt(rows: Callable[..., Rows]) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert one(rows(row)).messages == (
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": "3"},
    )
    plain = one(rows(row), chat_template=False)
    assert plain.prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert plain.prompt.endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert plain.completion == "3"
    bare = one(rows({"instruction": "Hi.", "input": None, "output": "3", "system": "S"}), chat_template=False)
    assert bare.prompt == "S\n\n### Instruction:\nHi.\n\n### Response:\n"


def test_an_asked_format_must_have_its_columns(rows: Callable[..., Rows]) -> None:
    with pytest.raises(DataError, match="format `alpaca` needs the column `instruction`; found `text`"):
        resolve_format(rows({"text": "a"}), "alpaca")
    assert resolve_format(rows({"text": "a", "messages": []}), "text") == "text"


def test_five_bad_rows_are_shown_and_all_are_counted(rows: Callable[..., Rows]) -> None:
    with pytest.raises(DataError) as caught:
        one(rows(*({"text": None} for _ in range(8)), {"text": "fine"}))
    lines = caught.value.message.splitlines()
    assert lines[0] == "8 of 9 rows do not fit the format `text`"
    assert [line.split(":")[1] for line in lines[1:6]] == ["1", "2", "3", "4", "5"]
    assert lines[6:] == ["  and 3 more"]


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("[" * 100_000 + "]" * 100_000, "JSON nested too deeply"),
        ('[{"a": NaN}]', "NaN is no JSON"),
        ('[{"a": 1, "a": 2}]', "the key 'a' twice"),
    ],
)
def test_a_tools_string_that_is_no_plain_json_is_located(rows: Callable[..., Rows], tools: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"data.jsonl:1: `tools`: found .*{said}"):
        one(rows({"messages": chat("a", "b"), "tools": tools}))


def test_a_value_too_deep_to_write_out_is_located() -> None:
    deep: Any = []
    for _ in range(200_000):
        deep = [deep]
    source = Rows([{"messages": [{"role": deep, "content": "a"}]}], ("messages",), ("d",), "", range(1))
    with pytest.raises(DataError, match=r"d: row 1: `messages`\[0\].role: found a list nested too deeply"):
        convert(source, "messages", chat_template=True)


def test_a_message_about_many_or_long_names_stays_short() -> None:
    with pytest.raises(DataError, match="`a{37}\\.\\.\\.`, `0`, .* and 971 more") as caught:
        detect_format(["a" * 200_000, *map(str, range(1_000))], {})
    assert len(caught.value.message) < 2_000
