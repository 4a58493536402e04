"""Tool calls and their results in the form that a chat template takes.

``arguments`` may be an object or that object written as JSON, as OpenAI's API gives it; some templates take the one
and encode the other twice, some fail. Which form a template takes is found by rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from ftune.data.chat import ChatTemplate, apply_template
from ftune.data.formats import Conversation, Message
from ftune.data.outline import outline_of, shape_of
from ftune.data.readers import DECODER
from ftune.data.turns import CALL_TEXT
from ftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ARGUMENTS_AS_TEXT", "TOOL_ROLES", "Forms", "canonical", "check_arguments", "other_value"]

ARGUMENTS_AS_TEXT = "the arguments of a tool call are no JSON object: they are given to the chat template as they are"

# what templates call the speaker of a tool's result, and of instructions; the first is what rows have here
TOOL_ROLES = ("tool", "ipython", "observation", "function")
DEVELOPER_ROLES = ("developer", "system")


@dataclass(frozen=True)
class Form:
    """One way to write a conversation with tools.

    Attributes:
        arguments: Whether arguments are an ``object`` or a ``string`` of JSON.
        content: What a turn that only calls tools has for content: an ``empty`` string, ``null``, or ``absent``.
        tool: The role of a tool's result.
        developer: The role of a developer's message.
        as_text: Whether calls that the row has as text are left as text.
        numbered: Whether calls get ids of nine digits, and results those of their calls, as Mistral's templates ask.
    """

    arguments: str = "object"
    content: str = "empty"
    tool: str = "tool"
    developer: str = "developer"
    as_text: bool = False
    numbered: bool = False

    def of(self, conversation: Conversation) -> Conversation:
        """The conversation, written so."""
        messages = _numbered(conversation.messages) if self.numbered else conversation.messages
        return replace(conversation, messages=tuple(self._message(message) for message in messages))

    def _message(self, message: Message) -> Message:
        role = message["role"]
        changed = {**message, "role": {"tool": self.tool, "developer": self.developer}.get(role, role)}
        text = changed.pop(CALL_TEXT, None)
        if self.as_text and text is not None:
            del changed["tool_calls"]
            changed["content"] = text
        elif message.get("tool_calls"):
            changed["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
            if not message["content"] and self.content != "empty":
                changed["content"] = None
                if self.content == "absent":
                    del changed["content"]
        return changed

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function.get("arguments")
        if self.arguments == "object" or isinstance(arguments, str) or arguments is None:
            return dict(call)
        return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}


class Forms:
    """The form that a template takes, found once for each shape of conversation.

    It is found on the shape's outline, so that it depends neither on other rows nor on their order. Only where what is
    found does not do for a conversation, it is looked for on that conversation itself.

    Args:
        tokenizer: For its special tokens.
        template: What renders.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._known: dict[str, tuple[Form | None, bool]] = {}

    def fitted(self, conversation: Conversation) -> Conversation:
        """The conversation in the form that loses least; as it is where no form renders."""
        kind = _kind(conversation)
        if not any(kind):
            return conversation
        outline = outline_of(conversation)
        shape = shape_of(outline)
        if shape not in self._known:
            found = self._best(outline, _kind(outline))
            self._known[shape] = found, found is not None and self._suits(found.of(outline))
        form, suits = self._known[shape]
        written = form.of(conversation) if form is not None else conversation
        if form is None or (not self._suits(written) and (suits or self._rendered(written) is None)):
            form = self._best(conversation, kind) or form or Form()
        return form.of(conversation)

    def _suits(self, conversation: Conversation) -> bool:
        """Whether a conversation renders, with the arguments of its calls written once."""
        text = self._rendered(conversation)
        return text is not None and all(
            _encoded_once(call["function"].get("arguments"), text)
            for message in conversation.messages
            for call in message.get("tool_calls") or ()
        )

    def _best(self, conversation: Conversation, kind: tuple[bool, ...]) -> Form | None:
        """The form that loses least, the usual one first; None where none renders."""
        best, least = None, None
        for form in _forms(kind):
            cost = self._cost(form.of(conversation))
            if cost is not None and (least is None or cost < least):
                best, least = form, cost
            if least == 0:
                break
        return best

    def _rendered(self, conversation: Conversation) -> str | None:
        try:
            return apply_template(conversation.messages, conversation, self._tokenizer, self._template)
        except DataError:
            return None

    def _cost(self, conversation: Conversation) -> int | None:
        """How much of calls and results is not in the text as it should be; None where the template refuses."""
        text = self._rendered(conversation)
        if text is None:
            return None
        cost = 0
        looked_at: set[str] = set()
        for index, message in enumerate(conversation.messages):
            # turns that are alike are shown alike: a long row has few kinds of them
            functions = [call["function"] for call in message.get("tool_calls") or ()]
            alike = json.dumps([message["role"], message.get("content"), functions], default=str)
            if alike in looked_at:
                continue
            looked_at.add(alike)
            for place, call in enumerate(message.get("tool_calls") or ()):
                function = call["function"]
                cost += not _encoded_once(function.get("arguments"), text)
                for key in ("name", "arguments"):
                    cost += bool(function.get(key)) and self._is_hidden(conversation, text, index, place, key)
            if message["role"] in (*TOOL_ROLES, *DEVELOPER_ROLES) and message.get("content"):
                cost += self._is_hidden(conversation, text, index)
        return cost

    def _is_hidden(self, conversation: Conversation, text: str, *place: int | str) -> bool:
        """Whether the text is the same with another value: the content of a message, or a key of one of its calls."""
        messages = list(conversation.messages)
        index, *inner = place
        assert isinstance(index, int)
        message = messages[index]
        if inner:
            call, key = int(inner[0]), str(inner[1])
            calls = list(message["tool_calls"])
            function = calls[call]["function"]
            calls[call] = {**calls[call], "function": {**function, key: other_value(function[key])}}
            messages[index] = {**message, "tool_calls": calls}
        else:
            messages[index] = {**message, "content": other_value(message["content"])}
        return self._rendered(replace(conversation, messages=tuple(messages))) == text


def canonical(message: Message, place: str) -> Message:
    """A message whose tool calls are OpenAI's, with arguments as objects wherever they are JSON objects.

    Raises:
        DataError: A call is none.
    """
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_canonical(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]}


def _canonical(call: Any, place: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = _decoded(call)
    if not isinstance(call, Mapping):
        raise DataError(f"{place}: expected {{name, arguments}}, found {str(call)[:40]!r}")
    if isinstance(call.get("function"), Mapping):
        outer, function = {**call}, dict(call["function"])
    else:
        outer = {key: value for key, value in call.items() if key in ("id", "type", "index")}
        function = {key: value for key, value in call.items() if key not in outer}
    if not isinstance(function.get("name"), str):
        raise DataError(
            f"{place}: a call without a name; found the keys {', '.join(map(str, call))}",
            help='write {"type": "function", "function": {"name": ..., "arguments": {...}}}',
        )
    if "parameters" in function and "arguments" not in function:
        function["arguments"] = function.pop("parameters")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        decoded = _decoded(arguments) if arguments.strip() else {}
        function["arguments"] = decoded if isinstance(decoded, dict) else arguments
    elif arguments is None:
        function["arguments"] = {}
    return {"type": "function", **outer, "function": function}


def check_arguments(conversation: Conversation, trained: Sequence[int]) -> list[str]:
    """What to tell of arguments that are no JSON object.

    Args:
        conversation: Its calls as ``canonical`` makes them.
        trained: Indices of the messages that are trained on.

    Raises:
        DataError: A call that is trained on has arguments that begin as JSON and are none. Other text may be meant:
            some tools take code or a query as it is.
    """
    notes: dict[str, None] = {}
    for index, message in enumerate(conversation.messages):
        for place, call in enumerate(message.get("tool_calls") or ()):
            arguments = call["function"].get("arguments")
            if isinstance(arguments, Mapping):
                continue
            notes[ARGUMENTS_AS_TEXT] = None
            if index not in trained or not isinstance(arguments, str) or arguments.lstrip()[:1] not in ("{", "["):
                continue
            try:
                DECODER.decode(arguments)
            except (ValueError, RecursionError) as error:
                why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                said = arguments if len(arguments) <= 40 else f"{arguments[:37]}..."
                raise DataError(
                    f"messages[{index}].tool_calls[{place}]: `arguments` is no valid JSON ({why}): {said!r}",
                    help="write the arguments as an object, or as its JSON in a string; or set `weight: 0` on the turn",
                ) from None
    return list(notes)


def _decoded(text: str) -> Any:
    """JSON as values; text that is none as it is."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


def _kind(conversation: Conversation) -> tuple[bool, ...]:
    """What decides the form: calls, with arguments, without content; results; a developer's message; tools."""
    calls = [message for message in conversation.messages if message.get("tool_calls")]
    roles = {message["role"] for message in conversation.messages}
    if not calls and not roles & {"tool", "developer"}:
        return ()
    return (
        bool(calls),
        any(call["function"].get("arguments") for message in calls for call in message["tool_calls"]),
        any(not message["content"] for message in calls),
        "tool" in roles,
        "developer" in roles,
        bool(conversation.tools) and bool(calls),
        bool(calls) and all(CALL_TEXT in message for message in calls),
    )


def _forms(kind: tuple[bool, ...]) -> Iterator[Form]:
    """The forms that may differ for a kind of conversation, the usual one first."""
    calls, _, silent, tool, developer, _, text = kind
    for as_text, numbered, role, said, content, arguments in product(
        (False, True) if text else (False,),
        (False, True) if calls else (False,),
        TOOL_ROLES if tool else TOOL_ROLES[:1],
        DEVELOPER_ROLES if developer else DEVELOPER_ROLES[:1],
        ("empty", "absent", "null") if silent else ("empty",),
        ("object", "string") if calls else ("object",),
    ):
        yield Form(arguments, content, role, said, as_text, numbered)


def _numbered(messages: Sequence[Message]) -> list[Message]:
    """The messages with ids of nine digits; a result without one is that of the first call without a result."""
    numbers: dict[Any, str] = {}
    waiting: list[str] = []
    found: list[Message] = []
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                waiting.append(f"{len(numbers) + 1:09d}")
                numbers[call.get("id", object())] = waiting[-1]
                calls.append({**call, "id": waiting[-1]})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            number = numbers.get(message.get("tool_call_id")) or (waiting[0] if waiting else "0" * 9)
            if number in waiting:
                waiting.remove(number)
            message = {**message, "tool_call_id": number}
        found.append(message)
    return found


def other_value(value: Any) -> Any:
    """Another value of the same shape: a string keeps its length and its kinds of characters."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):
        return {key: other_value(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [other_value(inner) for inner in value]
    if not isinstance(value, str):
        return "x"
    places = [i for i, character in enumerate(value) if character.isalnum()]
    if value.lstrip()[:1] in ("{", "["):  # JSON stays JSON: a letter inside of quotes, else a digit
        places = [match.start(1) for match in re.finditer(r'([A-Za-z0-9])"', value)] or [
            i for i in places if value[i].isdigit()
        ]
    if not places:
        return f"{value}x"
    place = places[-1]
    # neither upper nor lower case of what was there: a template may change either
    new = ("1" if value[place] != "1" else "2") if value[place].isdigit() else ("z" if value[place] in "qQ" else "q")
    return value[:place] + new + value[place + 1 :]


def _encoded_once(arguments: Any, text: str) -> bool:
    """Whether arguments are neither shown as Python prints them nor as a string inside of a string."""
    if isinstance(arguments, str):
        escaped = json.dumps(arguments, ensure_ascii=False)[1:-1]
        return escaped == arguments or escaped not in text or arguments in text.replace(escaped, "")
    return not arguments or str(arguments) not in text
