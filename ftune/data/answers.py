"""An answer as it was generated, taken apart: reasoning, what is said, tool calls, JSON.

Nothing here knows a model: the marks are those that chat templates in use write.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftune.data.chat import ChatTemplate
from ftune.data.formats import Conversation
from ftune.data.spans import render
from ftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NO_JSON", "Answer", "Call", "calls_of", "json_in", "read_answer", "same_value", "written_answer"]

NO_JSON = object()
"""What ``json_in`` returns where there is no JSON: null is a value."""

Call = tuple[str, Any]
"""A tool's name and its arguments."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer.

    Attributes:
        text: What is said, without special tokens and reasoning, trimmed.
        whole: The same with the reasoning.
        calls: Tool calls in it, in order.
    """

    text: str
    whole: str
    calls: tuple[Call, ...] = ()


def read_answer(raw: str, specials: Sequence[str]) -> Answer:
    """Take an answer apart.

    Args:
        raw: As generated up to its end, special tokens in it.
        specials: The texts of the special tokens.
    """
    marks = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True)))) if specials else None

    def plain(text: str) -> str:
        return (marks.sub("", text) if marks else text).strip()

    said = _without_reasoning(raw)
    return Answer(plain(said), plain(raw), tuple(_calls_in(said)))


def written_answer(
    conversation: Conversation, index: int, prompt: str, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> str:
    """What the assistant has to write behind ``prompt``: message ``index`` as rendered, without its end of turn."""
    upto = replace(conversation, messages=conversation.messages[: index + 1], trained_from=index)
    content = str(conversation.messages[index].get("content") or "")
    try:
        rendered = render(upto, tokenizer, template)
    except DataError:  # a template that renders the last turn in a way of its own
        return content
    if rendered.text.startswith(prompt):
        written = rendered.text[len(prompt) :]
    elif rendered.spans:
        written = rendered.text[slice(*rendered.spans[-1])]
    else:
        return content
    ends = (*template.specials, *(token.content for token in tokenizer.added_tokens_decoder.values()))
    written = written.rstrip()
    end = max((end for end in ends if written.endswith(end) and not end.startswith(("</", "[/"))), key=len, default="")
    return written.removesuffix(end)


# --- reasoning ---

_TAGS = "think|thinking|thought|reasoning|seed:think"
_REASONING = [
    re.compile(rf"<({_TAGS})>.*?</\1>", re.DOTALL),
    re.compile(r"\[THINK\].*?\[/THINK\]", re.DOTALL),
    re.compile(r"<\|channel\|>analysis(?:(?!<\|message\|>).)*<\|message\|>.*?(?:<\|end\|>|\Z)", re.DOTALL),
    re.compile(r"<\|START_THINKING\|>.*?<\|END_THINKING\|>", re.DOTALL),
    # Opened in the prompt: the answer begins inside of it.
    re.compile(rf"\A(?:(?!<(?:{_TAGS})>).)*?</(?:{_TAGS})>", re.DOTALL),
    re.compile(r"\A(?:(?!\[THINK\]).)*?\[/THINK\]", re.DOTALL),
    # Never closed: there is no answer yet.
    re.compile(rf"<(?:{_TAGS})>.*\Z", re.DOTALL),
    re.compile(r"\[THINK\].*\Z", re.DOTALL),
]
_HEADER = re.compile(r"(?:<\|start\|>assistant)?<\|channel\|>final(?:(?!<\|message\|>).)*<\|message\|>", re.DOTALL)


def _without_reasoning(raw: str) -> str:
    for pattern in _REASONING:
        raw = pattern.sub("", raw)
    return _HEADER.sub("", raw)


# --- tool calls ---

_HARMONY = re.compile(r"to=(?:functions\.)?([\w.-]+)[^{\[]*?<\|message\|>\s*", re.DOTALL)
_NAMED = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK = re.compile(r"<｜tool▁sep｜>\s*([\w.-]+)\s*(?:```json)?\s*(?=[{\[])")
_XML = re.compile(r"<function=([\w.-]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([\w.-]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_ARGUMENTS = ("arguments", "parameters", "args")


def calls_of(message: Mapping[str, Any]) -> tuple[Call, ...]:
    """The tool calls that a message of the data has."""
    found = (_call(call) for call in message.get("tool_calls") or ())
    return tuple(call for call in found if call is not None)


def _call(value: Any) -> Call | None:
    """A call in OpenAI's form, or in the shorter one of most templates."""
    if not isinstance(value, Mapping):
        return None
    inner = value.get("function")
    if isinstance(inner, Mapping):
        value = inner
    name = value.get("name", inner if isinstance(inner, str) else None)
    key = next((key for key in _ARGUMENTS if key in value), None)
    if not isinstance(name, str) or key is None:
        return None
    arguments = value[key]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            pass
    return name, {} if arguments is None else arguments


def _calls_in(text: str) -> Iterator[Call]:
    for pattern in (_HARMONY, _NAMED, _DEEPSEEK):
        found = [(match[1], _json_at(text, match.end())) for match in pattern.finditer(text)]
        if found:
            yield from ((name, value) for name, (value, _) in found if value is not NO_JSON)
            return
    for match in _XML.finditer(text):
        values = {key: _scalar(value) for key, value in _PARAMETER.findall(match[2])}
        yield match[1], values or (value if (value := json_in(match[2])) is not NO_JSON else {})
    place = 0
    while (place := _next_bracket(text, place)) >= 0:
        value, end = _json_at(text, place)
        if value is NO_JSON:
            place += 1
            continue
        place = end
        for item in value if isinstance(value, list) else [value]:
            call = _call(item)
            if call is not None:
                yield call


def _scalar(text: str) -> Any:
    """A parameter's value: JSON where it is, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# --- JSON ---

_FENCE = re.compile(r"```[\w-]*\s*\n(.*?)\n?\s*```", re.DOTALL)
_DECODER = json.JSONDecoder()
_TRIES = 1000  # brackets at which a value may begin


def json_in(text: str) -> Any:
    """The JSON value that a text is, or has in a code fence, or has first; ``NO_JSON`` where there is none."""
    candidates = [text.strip(), *(found.strip() for found in _FENCE.findall(text))]
    for candidate in candidates:
        value, end = _json_at(candidate, 0)
        if value is not NO_JSON and not candidate[end:].strip():
            return value
    place = 0
    for _ in range(_TRIES):
        place = _next_bracket(text, place)
        if place < 0:
            break
        value, _ = _json_at(text, place)
        if value is not NO_JSON:
            return value
        place += 1
    return NO_JSON


def _next_bracket(text: str, start: int) -> int:
    places = [place for place in (text.find("{", start), text.find("[", start)) if place >= 0]
    return min(places, default=-1)


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at ``start``, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return NO_JSON, start


def same_value(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 1 is 1.0, true is not 1, keys have no order.

    NaN, which JSON does not have, equals itself.
    """
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_value(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_value, one, other))
    return type(one) is type(other) and bool(one == other)
