"""A conversation's shape: the same turns with values that stand for those of the row.

What is found out by rendering an outline holds for every conversation of its shape, whichever of them comes first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ftune.data.formats import Conversation, Message
from ftune.data.turns import CALL_TEXT

__all__ = ["outline_of", "shape_of"]

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks it up.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "What."}},
            "required": ["key"],
        },
    },
}


def outline_of(conversation: Conversation) -> Conversation:
    """The conversation with its texts, arguments, tools and ids replaced by others of the same kinds."""
    ids: dict[str, str] = {}
    messages = tuple(_outline(message, ids) for message in conversation.messages)
    return replace(conversation, messages=messages, row=0, tools=(TOOL,) if conversation.tools else ())


def shape_of(outline: Conversation) -> str:
    """A name for an outline."""
    return json.dumps([outline.messages, bool(outline.tools)])


def _outline(message: Message, ids: dict[str, str]) -> Message:
    found: Message = {}
    for key, value in message.items():
        if key == "role":
            found[key] = value
        elif key == "tool_calls":
            found[key] = [_call(call, ids) for call in value]
        elif key == "tool_call_id":
            found[key] = _id(value, ids)
        elif key == CALL_TEXT:
            found[key] = '{"name": "look_up", "arguments": {"key": "value"}}'
        else:
            found[key] = _value(value)
    return found


def _call(call: Mapping[str, Any], ids: dict[str, str]) -> dict[str, Any]:
    function = {key: _value(value) for key, value in call["function"].items()}
    rest = {key: _id(value, ids) if key == "id" else "function" for key, value in call.items() if key in ("id", "type")}
    return {**rest, "function": {**function, "name": "look_up"}}


def _id(value: Any, ids: dict[str, str]) -> Any:
    """Another id of the same length up to nine, which is what some templates ask for; equal ones stay equal."""
    if not isinstance(value, str):
        return value
    length = 9 if len(value) == 9 and value.isalnum() else 10
    return ids.setdefault(value, f"{len(ids) + 1:0{length}d}")


def _value(value: Any) -> Any:
    """A value of the same kind; what is empty stays so."""
    if not value and not isinstance(value, int | float):
        return value
    if isinstance(value, str):
        start = value.lstrip()[:1]
        return {"": " ", "{": '{"key": "value"}', "[": '["value"]'}.get(start, "said")
    if isinstance(value, Mapping):
        return {"key": "value"}
    return ["value"] if isinstance(value, list) else True
