"""The shapes that a row can have, and their conversion to conversations and plain texts.

==================  ==============================================  ======================================
format              columns                                         becomes
==================  ==============================================  ======================================
messages, sharegpt  messages (or conversations, conversation,       a conversation
                    dialog, dialogue): a list of {role, content}
                    or {from, value}; system, tools
prompt_completion   prompt, completion: strings                     plain text, trained on the completion
                    prompt, completion: lists of turns; system,     a conversation, trained on the completion
                    tools
alpaca              instruction, output; input, system, history     a conversation, or plain text in Alpaca's
                                                                    prompt without a chat template
text                text                                            plain text, all of it trained
==================  ==============================================  ======================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from ftune.data.columns import Unfit
from ftune.data.decoding import Row
from ftune.data.leftover import block_to_copy, of_pairs, proposal
from ftune.data.readers import DECODER
from ftune.data.sources import Rows
from ftune.data.turns import (
    CHAT_COLUMNS,
    Message,
    Misfit,
    kind_of,
    messages_in,
    missing_column,
    names,
    read_list,
    require_assistant,
    short,
)
from ftune.errors import DataError
from ftune.recipe.schema import SourceFormat

__all__ = [
    "Conversation",
    "Format",
    "Message",
    "Plain",
    "Record",
    "columns_of",
    "convert",
    "detect_format",
    "fits",
    "incomplete",
    "resolve_format",
]

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "text"]
EXPECTED = {
    "messages": "`messages`: a list of {role, content}, or of {from, value}",
    "sharegpt": "`conversations`: a list of {from, value}, or of {role, content}",
    "prompt_completion": "`prompt` and `completion`: two strings, or two lists of {role, content}",
    "alpaca": "`instruction` and `output`, and perhaps `input`, `system` and `history`",
    "text": "`text`: a string",
}
_ONE_TURN = 'each row is one turn: write a whole conversation as a row, {"messages": [{role, content}, ...]}'
_NO_EXAMPLES = {
    ("input_ids",): "ftune makes the tokens itself: give the texts or conversations that these were made from",
    ("role", "content"): _ONE_TURN,
    ("from", "value"): _ONE_TURN,
}
"""Columns of rows that no mapping makes examples of, and what to do."""
SHOWN = 5

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


# --- detection ---


def detect_format(columns: Sequence[str], first_row: Row) -> Format:
    """The format that columns and first row speak for.

    Where several fit, the one with more structure wins: data sets often carry a rendered ``text`` beside its
    parts.

    Raises:
        DataError: No format fits; lists the columns that there are and those that are expected.
    """
    chat = _chat_column(columns)
    others = ({"prompt", "completion"}, {"instruction", "output"}, {"text"})
    # a number or a name may stand in a column of such a name, for which conversation a text is of
    if chat is not None and (_may_be_turns(first_row.get(chat)) or not any(other <= set(columns) for other in others)):
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
    found = names(columns, "`")
    expected = "".join(f"\n  {name}: {columns}" for name, columns in EXPECTED.items())
    raise DataError(f"no format fits the columns {found}; expected the columns of one of{expected}")


def resolve_format(rows: Rows, asked: SourceFormat, path: str = "", key: str = "train") -> Format:
    """The format asked for, or the one detected; an asked one must have its columns.

    Args:
        rows: The rows, under the names of the recipe's mapping where it has one.
        asked: What the recipe says.
        path: The source as the recipe names it, for an example in the error.
        key: Which source it is.

    Raises:
        DataError: The columns do not fit; names the source.
    """
    source = rows.origin[0]
    try:
        if asked == "auto":
            _, first = next(iter(rows))
            return detect_format(rows.columns, first)
    except DataError as error:
        for known, help in _NO_EXAMPLES.items():
            if set(known) <= set(rows.columns):
                raise DataError(f"{source}: {error.message}", help=help) from None
        copy = block_to_copy(proposal(rows), key, path or source)
        header = "the first line of the file names its columns; " if _is_table(source) else ""
        raise DataError(
            f"{source}: {error.message}",
            help=f"{header}{of_pairs(rows)}say in the recipe what they are, for example\n{copy}",
        ) from None
    missing = [name for name in _needed(asked, rows.columns) if name not in rows.columns]
    if missing:
        raise DataError(
            f"{source}: format `{asked}` needs the column `{missing[0]}`; found {names(rows.columns, '`')}",
            help=f"expected {EXPECTED[asked]}; set `format: auto`, or say with `columns` what the columns are",
        )
    return asked


def fits(format: SourceFormat, columns: Sequence[str]) -> bool:
    """Whether some columns are enough for a format."""
    return format != "auto" and set(_needed(format, columns)) <= set(columns)


def incomplete(format: Format, rows: Rows) -> bool:
    """Whether a row lacks a column that the format cannot do without; converting the rows says which."""
    needed = set(_needed(format, rows.columns))
    return any(not needed <= row.keys() for _, row in rows)


def columns_of(format: Format, rows: Rows) -> tuple[str, ...]:
    """The columns that a format takes, where they are there."""
    if format in ("messages", "sharegpt"):
        return (_chat_column(rows.columns) or "messages", "system", "tools")
    if format == "prompt_completion":
        turns = any(isinstance(row.get("prompt"), list) for _, row in islice(rows, 1))
        return ("prompt", "completion", *(("system", "tools") if turns else ()))
    return ("instruction", "input", "output", "system", "history") if format == "alpaca" else ("text",)


def _may_be_turns(value: Any) -> bool:
    """Whether a value is a list, or one written out as JSON, or says nothing."""
    return value is None or isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _is_table(name: str) -> bool:
    return name.lower().endswith((".csv", ".tsv"))


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


def convert(rows: Rows, name: Format, *, chat_template: bool, shown: int = SHOWN) -> list[Record]:
    """Every row as a conversation or a plain text, in order.

    Args:
        rows: The rows.
        name: Their format.
        chat_template: Whether there is a chat template; alpaca rows become conversations only then.
        shown: How many misfits an error names.

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
            if isinstance(row, Unfit):
                raise Misfit(row.why)
            records.append(_convert(row, number, name, chat, chat_template))
        except Misfit as misfit:
            count += 1
            if len(misfits) < shown:
                misfits.append(f"\n  {rows.where(number)}: {_in_the_files_words(str(misfit), rows.named)}")
    if count:
        more = f"\n  and {count - shown} more" if count > shown else ""
        verb = "does" if count == 1 else "do"
        raise DataError(
            f"{count} of {len(rows)} rows {verb} not fit the format `{name}`{''.join(misfits)}{more}",
            help=f"`{name}` expects {EXPECTED[name]}",
        )
    return records


def _in_the_files_words(misfit: str, named: Mapping[str, str]) -> str:
    """A misfit that names a column as the format does, with what the recipe made that column from."""
    for name, source in named.items():
        if f"`{name}`" in misfit and source != name:
            return misfit.replace(f"`{name}`", f"`{name}` (from {short(source)})", 1)
    return misfit


def _convert(row: Row, number: int, name: Format, chat: str, chat_template: bool) -> Record:
    """One row; ``chat`` is the column of its turns."""
    match name:
        case "messages" | "sharegpt":
            messages = messages_in(row, chat)
            require_assistant(messages, chat)
            return Conversation((*_system(row, messages), *messages), number, tools=_tools(row))
        case "prompt_completion":
            if isinstance(row.get("prompt"), list):
                prompt, completion = messages_in(row, "prompt"), messages_in(row, "completion")
                require_assistant(completion, "completion")
                prompt = [*_system(row, prompt), *prompt]
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
    history = _history(row)
    system = _system(row, history)
    if chat_template:
        user = f"{instruction}\n\n{given}" if given.strip() else instruction
        turns = ({"role": "user", "content": user}, {"role": "assistant", "content": output})
        return Conversation((*system, *history, *turns), number)
    if history:
        raise Misfit("`history`: earlier turns need a chat template, and the tokenizer has none")
    if system:
        preamble = system[0]["content"]
    else:
        preamble = ALPACA_SYSTEM_WITH_INPUT if given.strip() else ALPACA_SYSTEM
    middle = f"### Input:\n{given}\n\n" if given.strip() else ""
    return Plain(f"{preamble}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n", output, number)


def _history(row: Row) -> list[Message]:
    """Earlier turns: a list of [what the user said, what the assistant answered], or that list as JSON."""
    wanted = "a list of [instruction, output]"
    pairs = read_list(row.get("history"), "history", wanted)
    if pairs is None or pairs == "" or pairs == []:
        return []
    if not isinstance(pairs, list):
        raise Misfit(f"`history`: found {kind_of(pairs)}; expected {wanted}")
    messages: list[Message] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise Misfit(f"`history`[{index}]: found {short(pair)}; expected [instruction, output]: two strings")
        if not pair[1].strip():
            raise Misfit(f"`history`[{index}]: an assistant turn without text")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _system(row: Row, messages: Sequence[Message]) -> list[Message]:
    """The system message of a ``system`` column, where it says something that the first of the messages does not."""
    if row.get("system") is None:
        return []
    text = _string(row, "system", blank=True)
    if not text.strip():
        return []
    if messages and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"] == text:
            return []
        raise Misfit("`system`: the row has a system turn as well, with another text")
    return [{"role": "system", "content": text}]


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    """The ``tools`` column: a list of JSON schemas, or that list written out as a string."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = DECODER.decode(tools)
        except ValueError as error:
            raise Misfit(f"`tools`: found a string that is not JSON ({error}); expected a list of schemas") from None
        except RecursionError:
            raise Misfit("`tools`: found a string of JSON nested too deeply; expected a list of schemas") from None
    if tools is None or tools == "" or tools == []:
        return ()
    if not isinstance(tools, list):
        raise Misfit(f"`tools`: found {kind_of(tools)}; expected a list of JSON schemas")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise Misfit(f"`tools`[{index}]: found {kind_of(tool)}; expected a JSON schema")
    return tuple(tools)


def _string(row: Row, column: str, *, blank: bool = False) -> str:
    """A column's string; ``blank`` allows nothing but white space."""
    if column not in row:
        raise Misfit(missing_column(row, column))
    value = row[column]
    if isinstance(value, str) and (blank or value.strip()):
        return value
    found = ("a string of white space" if value else "an empty string") if isinstance(value, str) else kind_of(value)
    if value is None or isinstance(value, str):
        mend = "fill it in, or leave out the row"
    elif isinstance(value, list | Mapping):
        mend = "expected a string: in `columns`, a name with dots (`a.b.0`) takes what is inside"
    else:
        mend = f"expected a string: `columns: {{{column}: {column}}}` takes it as text"
    raise Misfit(f"`{column}`: found {found}; {mend}")
