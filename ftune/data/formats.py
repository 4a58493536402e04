"""The shapes that a row can have, and their conversion to conversations and plain texts.

==================  ==============================================  ======================================
format              columns                                         becomes
==================  ==============================================  ======================================
messages            messages (or conversation, conversations):      a conversation
                    a list of {role, content}
sharegpt            conversations (or conversation, messages):      a conversation
                    a list of {from, value}; system
prompt_completion   prompt, completion: strings                     plain text, trained on the completion
                    prompt, completion: lists of {role, content}    a conversation, trained on the completion
alpaca              instruction, output; input, system              a conversation, or plain text in Alpaca's
                                                                    prompt without a chat template
text                text                                            plain text, all of it trained
==================  ==============================================  ======================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ftune.data.sources import DECODER, Row, Rows
from ftune.errors import DataError
from ftune.recipe.schema import SourceFormat

__all__ = [
    "Conversation",
    "Format",
    "Message",
    "Plain",
    "Record",
    "convert",
    "detect_format",
    "resolve_format",
]

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "text"]
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
CHAT_COLUMNS = ("messages", "conversations", "conversation")
EXPECTED = {
    "messages": "`messages`: a list of {role, content}",
    "sharegpt": "`conversations`: a list of {from, value}",
    "prompt_completion": "`prompt` and `completion`: two strings, or two lists of {role, content}",
    "alpaca": "`instruction` and `output`, and perhaps `input` and `system`: strings",
    "text": "`text`: a string",
}
SHOWN = 5
SHOWN_NAMES = 30

# the prompt of Stanford Alpaca, which base models without a chat template are commonly tuned with
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_SYSTEM_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that a chat template renders.

    Attributes:
        messages: Each has ``role`` and ``content`` (a string), and whatever else the row gave it.
        row: The row's number in its source, counted from 0.
        trained_from: Assistant messages before this index are context, never trained.
        tools: JSON schemas of the tools that the template is told of.
    """

    messages: tuple[Message, ...]
    row: int
    trained_from: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Plain:
    """Text that no template touches: a prompt (perhaps empty) and what follows it.

    Attributes:
        prompt: Context.
        completion: What is trained; an end-of-sequence token follows it.
        row: The row's number in its source, counted from 0.
    """

    prompt: str
    completion: str
    row: int


Record = Conversation | Plain


class _Misfit(Exception):
    """Why one row does not fit its format: the column, what was found, what is expected."""


# --- detection ---


def detect_format(columns: Sequence[str], first_row: Row) -> Format:
    """The format that columns and first row speak for.

    Where several fit, the one with more structure wins: data sets often carry a rendered ``text`` beside its
    parts.

    Raises:
        DataError: No format fits; lists the columns that there are and those that are expected.
    """
    chat = _chat_column(columns)
    if chat is not None:
        turns = first_row.get(chat)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, Mapping) and "from" in first and "value" in first:
            return "sharegpt"
        return "messages"
    if {"prompt", "completion"} <= set(columns):
        return "prompt_completion"
    if {"instruction", "output"} <= set(columns):
        return "alpaca"
    if "text" in columns:
        return "text"
    found = _names(columns, "`")
    expected = "".join(f"\n  {name}: {columns}" for name, columns in EXPECTED.items())
    raise DataError(
        f"no format fits the columns {found}; expected the columns of one of{expected}",
        help="rename the columns, or write the rows out as `messages`",
    )


def resolve_format(rows: Rows, asked: SourceFormat) -> Format:
    """The format asked for, or the one detected; an asked one must have its columns.

    Raises:
        DataError: The columns do not fit; names the source.
    """
    try:
        if asked == "auto":
            _, first = next(iter(rows))
            return detect_format(rows.columns, first)
        missing = [name for name in _needed(asked, rows.columns) if name not in rows.columns]
        if missing:
            found = _names(rows.columns, "`")
            raise DataError(
                f"format `{asked}` needs the column `{missing[0]}`; found {found}",
                help=f"expected {EXPECTED[asked]}; or set `format: auto`",
            )
        return asked
    except DataError as error:
        raise DataError(f"{rows.origin[0]}: {error.message}", help=error.help) from None


def _needed(name: Format, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that a format cannot do without."""
    if name in ("messages", "sharegpt"):
        return (_chat_column(columns) or ("messages" if name == "messages" else "conversations"),)
    return {
        "prompt_completion": ("prompt", "completion"),
        "alpaca": ("instruction", "output"),
        "text": ("text",),
    }[name]


def _chat_column(columns: Sequence[str]) -> str | None:
    return next((name for name in CHAT_COLUMNS if name in columns), None)


# --- conversion ---


def convert(rows: Rows, name: Format, *, chat_template: bool) -> list[Record]:
    """Every row as a conversation or a plain text, in order.

    Args:
        rows: The rows.
        name: Their format.
        chat_template: Whether there is a chat template; alpaca rows become conversations only then.

    Raises:
        DataError: Rows do not fit; names the first few with place, column, what was found and what is
            expected.
    """
    chat = _chat_column(rows.columns) or "messages"
    records: list[Record] = []
    misfits: list[str] = []
    count = 0
    for number, row in rows:
        try:
            records.append(_convert(row, number, name, chat, chat_template))
        except _Misfit as misfit:
            count += 1
            if len(misfits) < SHOWN:
                misfits.append(f"\n  {rows.where(number)}: {misfit}")
    if count:
        more = f"\n  and {count - SHOWN} more" if count > SHOWN else ""
        verb = "does" if count == 1 else "do"
        raise DataError(
            f"{count} of {len(rows)} rows {verb} not fit the format `{name}`{''.join(misfits)}{more}",
            help=f"`{name}` expects {EXPECTED[name]}",
        )
    return records


def _convert(row: Row, number: int, name: Format, chat: str, chat_template: bool) -> Record:
    """One row; ``chat`` is the column of its turns."""
    match name:
        case "messages":
            messages = _openai_messages(row, chat)
            _require_assistant(messages, chat)
            return Conversation(tuple(messages), number, tools=_tools(row))
        case "sharegpt":
            messages = _system(row) + _sharegpt_messages(row, chat)
            _require_assistant(messages, chat)
            return Conversation(tuple(messages), number, tools=_tools(row))
        case "prompt_completion":
            if isinstance(row.get("prompt"), list):
                prompt, completion = _openai_messages(row, "prompt"), _openai_messages(row, "completion")
                _require_assistant(completion, "completion")
                return Conversation((*prompt, *completion), number, len(prompt), _tools(row))
            return Plain(_string(row, "prompt", blank=True), _string(row, "completion"), number)
        case "alpaca":
            return _alpaca(row, number, chat_template)
        case "text":
            return Plain("", _string(row, "text"), number)


def _alpaca(row: Row, number: int, chat_template: bool) -> Record:
    """An instruction with its output: two turns, or Alpaca's prompt. Source: Stanford Alpaca, 2023."""
    instruction, output = _string(row, "instruction"), _string(row, "output")
    given = _string(row, "input", blank=True) if row.get("input") is not None else ""
    system = _system(row)
    if chat_template:
        user = f"{instruction}\n\n{given}" if given.strip() else instruction
        turns = ({"role": "user", "content": user}, {"role": "assistant", "content": output})
        return Conversation((*system, *turns), number)
    if system:
        preamble = system[0]["content"]
    else:
        preamble = ALPACA_SYSTEM_WITH_INPUT if given.strip() else ALPACA_SYSTEM
    middle = f"### Input:\n{given}\n\n" if given.strip() else ""
    return Plain(f"{preamble}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n", output, number)


def _openai_messages(row: Row, column: str) -> list[Message]:
    """A list of {role, content}; content a string or a list of text parts."""
    messages: list[Message] = []
    for place, turn in _turns(row, column, ("role", "content")):
        role = turn["role"]
        if role not in ROLES:
            raise _Misfit(f"{place}.role: found {_short(role)}; expected one of {', '.join(ROLES)}")
        calls = turn.get("tool_calls") if role == "assistant" else None
        content = _content(turn["content"], place, absent=bool(calls))
        if role == "assistant" and not calls and not content.strip():
            raise _Misfit(f"{place}.content: an assistant turn without text")
        # null keys come from tables, which give every message the keys of all; templates test for presence
        messages.append({**{k: v for k, v in turn.items() if v is not None}, "content": content})
    return messages


def _sharegpt_messages(row: Row, column: str) -> list[Message]:
    """A list of {from, value}."""
    messages: list[Message] = []
    for place, turn in _turns(row, column, ("from", "value")):
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise _Misfit(f"{place}.from: found {_short(turn['from'])}; expected one of {', '.join(SHAREGPT_ROLES)}")
        content = turn["value"]
        if not isinstance(content, str):
            raise _Misfit(f"{place}.value: found {_kind(content)}; expected a string")
        if role == "assistant" and not content.strip():
            raise _Misfit(f"{place}.value: an assistant turn without text")
        messages.append({"role": role, "content": content})
    return messages


def _turns(row: Row, column: str, keys: tuple[str, str]) -> list[tuple[str, Mapping[str, Any]]]:
    """The turns in a column, each with its place for messages; both keys are there."""
    if column not in row:
        raise _Misfit(f"the column `{column}` is missing")
    turns = row[column]
    wanted = f"{{{', '.join(keys)}}}"
    if not isinstance(turns, list):
        raise _Misfit(f"`{column}`: found {_kind(turns)}; expected a list of {wanted}")
    if not turns:
        raise _Misfit(f"`{column}`: found an empty list; expected at least one {wanted}")
    placed: list[tuple[str, Mapping[str, Any]]] = []
    for index, turn in enumerate(turns):
        place = f"`{column}`[{index}]"
        if not isinstance(turn, Mapping):
            raise _Misfit(f"{place}: found {_kind(turn)}; expected {wanted}")
        # an assistant turn that only calls tools may come without content
        missing = [key for key in keys if key not in turn and not (key == "content" and turn.get("tool_calls"))]
        if missing:
            found = _names(list(turn))
            raise _Misfit(f"{place}: found the keys {found}; expected {wanted}")
        placed.append((place, {keys[1]: None, **turn}))
    return placed


def _content(value: Any, place: str, *, absent: bool) -> str:
    """A message's text; ``absent`` allows null."""
    if value is None and absent:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _Misfit(f"{place}.content: found {_kind(value)}; expected a string or a list of text parts")
    for index, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = f"a part of type {_short(part.get('type'))}" if isinstance(part, Mapping) else _kind(part)
            raise _Misfit(f"{place}.content[{index}]: found {found}; expected {{type: text, text: a string}}")
    return "".join(part["text"] for part in value)


def _require_assistant(messages: list[Message], column: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        roles = _names([message["role"] for message in messages])
        raise _Misfit(f"`{column}`: no assistant turn to train on; found the roles {roles}")


def _system(row: Row) -> list[Message]:
    """The system message of a ``system`` column, where it says something."""
    if row.get("system") is None:
        return []
    text = _string(row, "system", blank=True)
    return [{"role": "system", "content": text}] if text.strip() else []


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    """The ``tools`` column: a list of JSON schemas, or that list written out as a string."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = DECODER.decode(tools)
        except ValueError as error:
            raise _Misfit(f"`tools`: found a string that is not JSON ({error}); expected a list of schemas") from None
        except RecursionError:
            raise _Misfit("`tools`: found a string of JSON nested too deeply; expected a list of schemas") from None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _Misfit(f"`tools`: found {_kind(tools)}; expected a list of JSON schemas")
    return tuple(tools)


def _string(row: Row, column: str, *, blank: bool = False) -> str:
    """A column's string; ``blank`` allows nothing but white space."""
    if column not in row:
        raise _Misfit(f"the column `{column}` is missing")
    value = row[column]
    if not isinstance(value, str):
        raise _Misfit(f"`{column}`: found {_kind(value)}; expected a string")
    if not blank and not value.strip():
        raise _Misfit(f"`{column}`: found an empty string")
    return value


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the string {_short(value)}"
    if isinstance(value, bool | int | float):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {value}"
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, Mapping) else type(value).__name__


def _names(of: Sequence[Any], quote: str = "") -> str:
    """Names of columns or keys, cut to fit a message."""
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in map(str, of[:SHOWN_NAMES])]
    more = f" and {len(of) - SHOWN_NAMES} more" if len(of) > SHOWN_NAMES else ""
    return ", ".join(f"{quote}{name}{quote}" for name in shown) + more or "none"


def _short(value: Any) -> str:
    """A value as Python writes it, cut to fit a line."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 40 else f"{text[:37]}..."
