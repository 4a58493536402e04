"""What a row says and a chat template does not show.

Found by rendering with another value: where the text stays the same, the value is not in it. Values of one kind (the
same key, in a message of the same role at the same place of a conversation) are shown alike, so each kind is
tried once; only what is trained is looked for in every row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftune.data.calls import TOOL_ROLES, other_value
from ftune.data.chat import ChatTemplate, apply_template, generation_prompt
from ftune.data.formats import Conversation, Message
from ftune.data.spans import Rendered
from ftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NOT_SHOWN", "Unrendered"]

NOT_SHOWN = "the chat template does not show "
"""How a note begins that names what is left out."""

HELP = (
    "name a chat template that shows it as `data.chat_template` (a Jinja file), or remove it from the rows, or set "
    "`weight: 0` on such turns"
)
# calls of one turn beyond this are shown as the last of these is
CALLS = 3
TAG = re.compile(r"</?[\w|:]+>|\[/?[A-Z_]+\]|<\|[^|<>]*\|>")


@dataclass
class _Seen:
    """What a conversation is trained as: the whole text, and a generation prompt where that is no part of it."""

    whole: str
    last: int | None = None
    prompt: str = ""


class Unrendered:
    """Looks for what a template leaves out.

    Args:
        tokenizer: For its special tokens.
        template: What renders.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._shown: dict[tuple[Any, ...], bool] = {}

    def check(
        self, conversation: Conversation, rendered: Rendered, wanted: Sequence[int], trained: Sequence[int]
    ) -> list[str]:
        """What to tell of a conversation that was rendered.

        Args:
            conversation: As it was rendered.
            rendered: What came out.
            wanted: Indices of the messages that the row has to be trained on.
            trained: Those of them that are shown as the model writes them.

        Raises:
            DataError: What is left out is the answer itself: text or call of a trained turn, or the tools that a
                call is one of.
        """
        text = _Seen(rendered.whole)
        if rendered.text != rendered.whole:
            text.last = max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
            text.prompt = generation_prompt(conversation, text.last, self._tokenizer, self._template)
        notes: dict[str, None] = {}
        lost: list[str] = []
        asked = max((i for i, message in enumerate(conversation.messages) if message["role"] == "user"), default=-1)
        calls = any(message.get("tool_calls") or message["role"] in TOOL_ROLES for message in conversation.messages)
        if conversation.tools and not self._is_shown(("tools", calls), conversation, text, _other_tools):
            if calls:
                lost.append("`tools`, which the messages use")
            else:
                notes[f"{NOT_SHOWN}`tools`"] = None
        for index, message in enumerate(conversation.messages):
            place = _place(conversation, index, index > asked)
            for key, call in _values(message):
                kind = (*place, key, call is not None and min(call, CALLS))
                if self._is_shown(kind, conversation, text, _other_value(index, key, call)):
                    continue
                name = key if call is None else f"tool_calls[].{key}"
                if (
                    index in trained
                    and key in ("content", "name", "arguments")
                    and (call is not None) != (key == "content")
                ):
                    what = "`content`" if call is None else "the tool call"
                    lost.append(f"{what} of messages[{index}], which is trained")
                    break
                earlier = (
                    "earlier " if message["role"] == "assistant" and index + 1 < len(conversation.messages) else ""
                )
                notes[f"{NOT_SHOWN}`{name}` of {earlier}{message['role']} messages"] = None
        if lost:
            raise DataError(f"{NOT_SHOWN}{_listed(lost)}", help=HELP)
        for index in trained:
            self._require_whole(conversation, index, text)
        return list(notes)

    def _is_shown(
        self,
        kind: tuple[Any, ...],
        conversation: Conversation,
        text: _Seen,
        other: Callable[[Conversation], Conversation],
    ) -> bool:
        if kind not in self._shown:
            self._shown[kind] = self._changes(other(conversation), text)
        return self._shown[kind]

    def _changes(self, conversation: Conversation, text: _Seen) -> bool:
        """Whether a conversation renders to another text; so where the template looks at it and refuses."""
        try:
            if apply_template(conversation.messages, conversation, self._tokenizer, self._template) != text.whole:
                return True
            return text.last is not None and text.prompt != generation_prompt(
                conversation, text.last, self._tokenizer, self._template
            )
        except DataError:
            return True

    def _require_whole(self, conversation: Conversation, index: int, text: _Seen) -> None:
        """Hold that all of a trained message's content is shown: a template may drop reasoning out of it."""
        content = conversation.messages[index].get("content") or ""
        if _is_in(content, text.whole):
            return
        start = 0
        for end in [*(match.start() for match in TAG.finditer(content)), len(content)]:
            part = TAG.sub("", content[start:end])
            if part.strip() and not _is_in(part, text.whole):
                for place in _ends(content, start, end):
                    changed = content[:place] + other_value(content[place]) + content[place + 1 :]
                    if not self._changes(_with(conversation, index, content=changed), text):
                        said = " ".join(part.split())
                        said = said if len(said) <= 40 else f"{said[:37]}..."
                        raise DataError(
                            f"{NOT_SHOWN}{said!r} of messages[{index}].content, which is trained",
                            help=HELP,
                        )
            start = end


def _listed(lost: Sequence[str]) -> str:
    """What is left out, the first three of it."""
    return ", and ".join([*lost[:3], *([f"{len(lost) - 3} more"] if len(lost) > 3 else [])])


def _place(conversation: Conversation, index: int, answers: bool) -> tuple[Any, ...]:
    """What a template may look at beside a message itself: its neighbours, its keys, where the last question is."""
    messages = conversation.messages
    message = messages[index]
    return (
        message["role"],
        tuple(sorted(key for key, value in message.items() if value)),
        messages[index - 1]["role"] if index else None,
        messages[index + 1]["role"] if index + 1 < len(messages) else None,
        answers,
        bool(conversation.tools),
    )


def _values(message: Message) -> Iterator[tuple[str, int | None]]:
    """What a message says beside its role: keys, and for those inside of a tool call its index."""
    for key, value in message.items():
        if key == "role" or _is_empty(value):
            continue
        if key != "tool_calls":
            yield key, None
            continue
        for index, call in enumerate(value[: CALLS + 1]):
            yield from ((inner, index) for inner in call if inner not in ("type", "function"))
            yield from ((inner, index) for inner, said in call["function"].items() if not _is_empty(said))


def _is_empty(value: Any) -> bool:
    """Whether there is nothing to show: null, white space, an empty list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def _other_value(index: int, key: str, call: int | None) -> Callable[[Conversation], Conversation]:
    """The conversation with one value changed."""

    def changed(conversation: Conversation) -> Conversation:
        message = conversation.messages[index]
        if call is None:
            return _with(conversation, index, **{key: other_value(message[key])})
        calls = list(message["tool_calls"])
        old = calls[call]
        if key in old:
            calls[call] = {**old, key: other_value(old[key])}
        else:
            calls[call] = {**old, "function": {**old["function"], key: other_value(old["function"][key])}}
        return _with(conversation, index, tool_calls=calls)

    return changed


def _other_tools(conversation: Conversation) -> Conversation:
    """The conversation with its last tool called otherwise: a template that shows one shows its name."""
    tool: dict[str, Any] = {**conversation.tools[-1]}
    if isinstance(tool.get("function"), dict):
        tool["function"] = {**tool["function"], "name": other_value(tool["function"].get("name"))}
    elif "name" in tool:
        tool["name"] = other_value(tool["name"])
    else:
        tool = other_value(tool)
    return replace(conversation, tools=(*conversation.tools[:-1], tool))


def _with(conversation: Conversation, index: int, **values: Any) -> Conversation:
    messages = list(conversation.messages)
    messages[index] = {**messages[index], **values}
    return replace(conversation, messages=tuple(messages))


def _ends(content: str, start: int, end: int) -> list[int]:
    """The first and the last letter of a part of the content, behind its tag."""
    opened = TAG.match(content, start)
    places = [i for i in range(opened.end() if opened else start, end) if content[i].isalnum()]
    return [places[0], places[-1]] if places else []


def _is_in(content: str, text: str) -> bool:
    stripped = content.strip()
    return stripped in text or any(json.dumps(stripped, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))
