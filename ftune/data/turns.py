"""Turns of a conversation as messages, whichever tool wrote them.

A turn is ``{role, content}``, as OpenAI's, or ``{from, value}``, as ShareGPT's; either key may go with either. Every
other key of a turn is kept (``tool_calls``, ``name``, ``weight``, ``reasoning_content``, ...). A call of a tool becomes
``tool_calls``, whether it was written as OpenAI's older ``function_call`` or as a turn of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftune.data.decoding import Row
from ftune.data.readers import DECODER

__all__ = [
    "CALL_TEXT",
    "CHAT_COLUMNS",
    "ROLES",
    "Message",
    "Misfit",
    "kind_of",
    "messages_in",
    "missing_column",
    "names",
    "read_list",
    "require_assistant",
    "short",
]

Message = dict[str, Any]

CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
CALL = "function_call"
"""A turn whose text is a call of a tool, and a key of a message that is one."""
CALL_TEXT = "call_text"
"""Key of a message whose calls the row has as text alone: that text, for templates that show no calls."""
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    CALL: "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""What tools call a speaker, and what chat templates call the same."""

TEXT_PARTS = ("text", "input_text", "output_text")
_INSTEAD = {
    **dict.fromkeys(("thinking", "reasoning"), "write its text as the message's `reasoning_content`"),
    "refusal": "write its text as a part of type text",
    "tool_use": "write it into the message's `tool_calls`, as {name, arguments}",
    "tool_result": "write it as a message of its own, {role: tool, content: its text}",
}
"""What to write for a part of a message that is no text, where something else takes it."""
WANTED = "{role, content} or {from, value}"
SHOWN_NAMES = 30


class Misfit(Exception):
    """Why one row does not fit its format: the column, what was found, what is expected."""


def messages_in(row: Row, column: str) -> list[Message]:
    """The messages of a column: a list of turns, or that list written as JSON in a string.

    Raises:
        Misfit: The column is missing, or a turn is none.
    """
    if column not in row:
        raise Misfit(missing_column(row, column))
    turns = read_list(row[column], column, f"a list of {WANTED}")
    if isinstance(turns, Mapping) and ("role" in turns or "from" in turns):  # one turn, as answers may be
        turns = [turns]
    if not isinstance(turns, list):
        raise Misfit(f"`{column}`: found {kind_of(turns)}; expected a list of {WANTED}")
    if not turns:
        raise Misfit(f"`{column}`: found an empty list; expected at least one {WANTED}")
    return [_message(turn, f"`{column}`[{index}]") for index, turn in enumerate(turns)]


def missing_column(row: Row, column: str) -> str:
    """That a row lacks a column, and what it has instead."""
    return f"the column `{column}` is missing; this row has {names(list(row), '`')}: give all rows the same columns"


def require_assistant(messages: Sequence[Message], column: str) -> None:
    """Hold that there is something to train on.

    Raises:
        Misfit: No message is the assistant's.
    """
    if not any(message["role"] == "assistant" for message in messages):
        roles = names([message["role"] for message in messages])
        raise Misfit(
            f"`{column}`: no assistant turn to train on; found the roles {roles}: add the answer, or leave out the row"
        )


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise Misfit(f"{place}: found {kind_of(turn)}; expected {WANTED}")
    # null keys come from tables, which give every turn the keys of all; templates test for presence
    kept = {key: value for key, value in turn.items() if value is not None}
    role_key = "role" if "role" in turn else "from"
    content_key = "content" if "content" in kept or "value" not in kept else "value"
    if role_key not in turn or not ({"content", "value", "tool_calls", CALL} & turn.keys()):
        raise Misfit(f"{place}: found the keys {names(list(turn))}; expected {WANTED}")
    if "role" in kept and "from" in kept and kept["role"] != kept["from"]:
        raise Misfit(f"{place}: found both `role` and `from`, which differ")
    if "content" in kept and "value" in kept and kept["content"] != kept["value"]:
        raise Misfit(f"{place}: found both `content` and `value`, which differ")
    said = turn[role_key]
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise Misfit(
            f"{place}.{role_key}: found {short(said)}; expected one of {', '.join(dict.fromkeys(ROLES.values()))}"
        )
    calls = _calls(kept, place) if role == "assistant" else []
    content = kept.get(content_key)
    as_text = {}
    if said.lower() in (CALL, "tool_call"):
        calls += _calls_in_text(content, f"{place}.{content_key}")
        as_text = {CALL_TEXT: content} if isinstance(content, str) else {}
        content = None
    if not content and not calls and isinstance(kept.get("refusal"), str):
        found = kind_of(content)
        raise Misfit(f"{place}.{content_key}: found {found} beside `refusal`; write the refusal's text as `content`")
    text = _text(content, f"{place}.{content_key}", absent=bool(calls))
    if role == "assistant" and not calls and not text.strip():
        raise Misfit(f"{place}.{content_key}: an assistant turn without text: write its answer, or leave out the row")
    consumed = {"role", "from", "content", "value"}
    if role == "assistant":
        consumed |= {"tool_calls", CALL}
    rest = {key: value for key, value in kept.items() if key not in consumed}
    return {"role": role, "content": text, **rest, **({"tool_calls": calls} if calls else {}), **as_text}


def _calls(turn: Mapping[str, Any], place: str) -> list[Any]:
    """The tool calls of an assistant's turn, an older single ``function_call`` among them."""
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise Misfit(f"{place}.tool_calls: found {kind_of(calls)}; expected a list of calls")
    single = turn.get(CALL)
    if single and not isinstance(single, Mapping):
        raise Misfit(f"{place}.{CALL}: found {kind_of(single)}; expected {{name, arguments}}")
    return [*calls, *([_call(single, f"{place}.{CALL}")] if single else [])]


def _calls_in_text(content: Any, place: str) -> list[Any]:
    """The calls that a turn of the role ``function_call`` is: JSON in its text, one call or a list of them."""
    wanted = '{"name": ..., "arguments": {...}} as JSON'
    if isinstance(content, str):
        try:
            content = DECODER.decode(content)
        except (ValueError, RecursionError):
            raise Misfit(f"{place}: found {kind_of(content)}; expected {wanted}") from None
    calls = content if isinstance(content, list) else [content]
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise Misfit(f"{place}: found {kind_of(content)}; expected {wanted}")
    return [_call(call, place) for call in calls]


def _call(call: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A call in OpenAI's form; the arguments stay as they are written."""
    if isinstance(call.get("function"), Mapping):
        return dict(call)
    if not isinstance(call.get("name"), str):
        raise Misfit(f"{place}: found a call with the keys {names(list(call))}; expected {{name, arguments}}")
    rest = {key: value for key, value in call.items() if key not in ("name", "arguments", "parameters", "type")}
    arguments = call.get("arguments", call.get("parameters", {}))
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments, **rest}}


def _text(value: Any, place: str, *, absent: bool) -> str:
    """A message's text; ``absent`` allows null."""
    if value is None and absent:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        mend = " (its JSON, say)" if isinstance(value, Mapping) else ""
        raise Misfit(f"{place}: found {kind_of(value)}; expected a string{mend} or a list of text parts")
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        only_text = isinstance(part, Mapping) and [*part] == ["text"]
        if not (kind in TEXT_PARTS or only_text) or not isinstance(part.get("text"), str):
            expected = "expected {type: text, text: a string}"
            if not isinstance(kind, str):
                found = f"the keys {names(list(part))}" if isinstance(part, Mapping) else kind_of(part)
            else:
                found = f"a part of type {short(kind)}"
                if kind not in TEXT_PARTS:
                    expected = _INSTEAD.get(kind, "ftune trains on text only: remove the part, or leave out the row")
            raise Misfit(f"{place}[{index}]: found {found}; {expected}")
    return "".join(part["text"] for part in value)


def read_list(value: Any, column: str, expected: str) -> Any:
    """A value as it is; a list written out as JSON in a string is read.

    Raises:
        Misfit: A string that begins as a list and is no JSON.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return DECODER.decode(value)
    except RecursionError:
        raise Misfit(f"`{column}`: found a string of JSON nested too deeply; expected {expected}") from None
    except ValueError as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        if "{'" in value or "['" in value:
            why = "it is a list as Python prints it, which pandas' to_csv writes: save as .jsonl or .parquet instead"
        raise Misfit(f"`{column}`: found a string that is not JSON ({why}); expected {expected}") from None


# --- words ---


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the string {short(value)}"
    if isinstance(value, bool | int | float):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {value}"
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, Mapping) else type(value).__name__


def names(of: Sequence[Any], quote: str = "") -> str:
    """Names of columns or keys, cut to fit a message."""
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in map(str, of[:SHOWN_NAMES])]
    more = f" and {len(of) - SHOWN_NAMES} more" if len(of) > SHOWN_NAMES else ""
    return ", ".join(f"{quote}{name}{quote}" for name in shown) + more or "none"


def short(value: Any) -> str:
    """A value as Python writes it, cut to fit a line."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 40 else f"{text[:37]}..."
