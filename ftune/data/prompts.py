"""Prompts without answers: rows of a new file, and what is typed, put as the run's rows were."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ftune.data.chat import generation_prompt, load_template
from ftune.data.columns import renamed
from ftune.data.formats import Conversation, Format, Message, Plain, convert, resolve_format
from ftune.data.read import read_source
from ftune.data.sources import Changed, Row, Rows, load_rows
from ftune.data.splits import GenerationItem
from ftune.data.tokenize import encoder_for, generation_items, template_for
from ftune.data.turns import CHAT_COLUMNS, ROLES
from ftune.data.turns import names as quoted
from ftune.errors import DataError, LocatedDataError
from ftune.recipe.columns import Field, is_template, parse_template
from ftune.recipe.schema import ColumnMap, DataSource, DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompting", "prompt_ids", "prompting_of", "read_prompts"]

ANSWER = "…"
"""Stands where a row has no answer; never read by a model."""
_ANSWERS = {"prompt_completion": ("prompt", "completion"), "alpaca": ("instruction", "output")}


@dataclass(frozen=True)
class Prompting:
    """How the run's rows were put before the model.

    Attributes:
        kind: ``chat`` (the chat template), ``raw`` (as it is), or ``alpaca`` (Alpaca's prompt, without a template).
        template: The text of the recipe's prompt around its one column, where it has one: before and behind.
    """

    kind: Literal["chat", "raw", "alpaca"]
    template: tuple[str, str] | None = None

    def filled(self, text: str) -> str:
        """A typed text inside the recipe's prompt."""
        before, behind = self.template or ("", "")
        return f"{before}{text}{behind}"


def prompting_of(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, trained: Format | None = None) -> Prompting:
    """How the rows of a recipe are put, by its first training row.

    Args:
        spec: The data block.
        tokenizer: Its chat template, where it has one, is what ``alpaca`` rows are put in.
        trained: The format that a run recorded, which tells where its data cannot be read any more; without it the
            tokenizer does.
    """
    given = spec.train.columns.given() if spec.train.columns is not None else {}
    template = _around(given.get("prompt") or given.get("instruction"))
    try:
        rows, format = _first_row(spec.train)
        if format == "text":
            return Prompting("raw")
        templated = template_for(tokenizer, spec, format, rows) is not None
        first = convert(rows, format, chat_template=templated)[0]
    except DataError:
        kind = _kind_without_data(spec, tokenizer, trained)
        return Prompting(kind, None if trained == "text" else template)
    if isinstance(first, Plain):
        return Prompting("alpaca" if format == "alpaca" else "raw", template)
    return Prompting("chat", template)


def _first_row(source: DataSource) -> tuple[Rows, Format]:
    """The first row of a source, and the format of all of them."""
    try:
        return read_source(source.model_copy(update={"max_examples": 1}))
    except LocatedDataError:  # a place inside a column, which later rows have and this one has not
        rows, format = read_source(source)
        return rows.select(rows.numbers[:1]), format


def _kind_without_data(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, trained: Format | None
) -> Literal["chat", "raw", "alpaca"]:
    templated = bool(tokenizer.chat_template or spec.chat_template)
    if trained in ("text", "prompt_completion"):  # a prompt may be turns, too, but is a text nearly always
        return "raw"
    if trained == "alpaca" and not templated:
        return "alpaca"
    return "chat" if templated else "raw"


def prompt_ids(
    prompting: Prompting,
    text: str,
    before: Sequence[Message],
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """The tokens of a typed prompt: those that the same prompt has in a row of the data.

    Args:
        prompting: How the run's rows were put.
        text: What is typed.
        before: The conversation so far, a system message perhaps first.
        spec: The run's data block.
        tokenizer: The run's.

    Raises:
        DataError: There is no chat template, or it refuses the conversation.
    """
    text = prompting.filled(text)
    template = load_template(tokenizer, spec.chat_template)
    encoder = encoder_for(tokenizer, template, spec.model_copy(update={"too_long": "truncate"}), "messages")
    if prompting.kind != "chat":
        if prompting.kind == "alpaca":
            system = {"system": before[0]["content"]} if before else {}
            row: Row = {"instruction": text, "output": ANSWER, **system}
            rows = Rows([row], tuple(row), ("the prompt",), "", range(1))
            (record,) = convert(rows, "alpaca", chat_template=False)
            assert isinstance(record, Plain)
            text = record.prompt
        (ids,) = encoder.prompt_ids([text], [True])
        return ids
    if template is None:
        raise DataError("this model has no chat template", help="set data.chat_template in the recipe")
    turns = (*before, {"role": "user", "content": text}, {"role": "assistant", "content": ANSWER})
    conversation = encoder.prepared(Conversation(turns, row=0))
    prompt = generation_prompt(conversation, len(turns) - 1, tokenizer, template)
    (ids,) = encoder.prompt_ids([prompt], [False])
    return ids


def _around(value: str | None) -> tuple[str, str] | None:
    """What stands before and behind the one column of a template."""
    if value is None or not is_template(value):
        return None
    parts = parse_template(value)
    places = [i for i, part in enumerate(parts) if isinstance(part, Field)]
    if len(places) != 1:
        return None
    texts = [part if isinstance(part, str) else "" for part in parts]
    return "".join(texts[: places[0]]), "".join(texts[places[0] + 1 :])


def read_prompts(
    path: str, spec: DataSpec, format: Format, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rows, list[GenerationItem]]:
    """The rows of a file as prompts: in the run's format and through its columns, with or without answers.

    Args:
        path: A file or directory.
        spec: The run's data block.
        format: What the run's rows were.
        tokenizer: The run's.

    Returns:
        The rows as they stand in the file, and a prompt for each.

    Raises:
        DataError: The file cannot be read, or its rows are not like the run's.
    """
    source = DataSource(path=path, format=spec.train.format, split_on=spec.train.split_on)
    read = load_rows(source, "eval")
    columns = spec.train.columns
    if columns is None or not columns.given():
        _require_prompts(read, format, path)
    if columns is not None and columns.given():
        rows, _ = renamed(read, _without_answer(columns), ("data", "train", "columns"), answers=False)
        rows = replace(rows, columns=(*rows.columns, *_answer_fields(columns)))
    else:
        rows = read
    if format == "text":
        rows, format = _changed(rows, ("prompt", "completion"), _of_text), "prompt_completion"
    elif format in _ANSWERS:
        prompt, answer = _ANSWERS[format]
        if answer not in rows.columns:
            rows = replace(rows, columns=(*rows.columns, answer))
        rows = _changed(rows, rows.columns, lambda row: _with_answer(row, prompt, answer))
    else:
        rows = _changed(rows, rows.columns, _with_turn)
    asked: Any = format if columns is None or not columns.given() else "auto"
    found = resolve_format(rows, asked, path, "eval")
    return read, generation_items(rows, tokenizer, spec.model_copy(update={"train_on": "assistant"}), found)


def _require_prompts(rows: Rows, format: Format, path: str) -> None:
    """Hold that there is a column to answer."""
    chat = next((name for name in CHAT_COLUMNS if name in rows.columns), "messages")
    column = "text" if format == "text" else _ANSWERS[format][0] if format in _ANSWERS else chat
    if column not in rows.columns:
        raise DataError(
            f"{path}: rows like the run's have the column `{column}`; found {quoted(rows.columns, '`')}",
            help=f"call the column that is to be answered `{column}`, and write it as the run's data have it",
        )


def _without_answer(columns: ColumnMap) -> ColumnMap:
    return columns.model_copy(update=dict.fromkeys(("completion", "output")))


def _answer_fields(columns: ColumnMap) -> tuple[str, ...]:
    return tuple(name for name in ("completion", "output") if getattr(columns, name) is not None)


def _changed(rows: Rows, columns: tuple[str, ...], change: Any) -> Rows:
    return replace(rows, source=Changed(rows.source, change), columns=columns)


def _of_text(row: Row) -> Row:
    return {"prompt": row.get("text"), "completion": ANSWER}


def _with_answer(row: Row, prompt: str, answer: str) -> Row:
    given = row.get(answer)
    if given is not None and (not isinstance(given, str) or given.strip()):
        return row
    turns = isinstance(row.get(prompt), list)
    return {**row, answer: [{"role": "assistant", "content": ANSWER}] if turns else ANSWER}


def _with_turn(row: Row) -> Row:
    """A conversation that ends with a turn to answer, or with an empty one of the assistant, with an answer there."""
    column = next((name for name in CHAT_COLUMNS if name in row), None)
    turns = row.get(column) if column is not None else None
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            return row
    if column is None or not isinstance(turns, list) or not turns or not isinstance(turns[-1], Mapping):
        return row
    last = turns[-1]
    behind = {"from": "gpt", "value": ANSWER} if "from" in last else {"role": "assistant", "content": ANSWER}
    if ROLES.get(str(last.get("role", last.get("from"))).lower()) != "assistant":
        return {**row, column: [*turns, behind]}
    said = [last.get(key) for key in ("content", "value", "tool_calls", "function_call", "refusal")]
    if any(value.strip() if isinstance(value, str) else value for value in said):
        return row
    return {**row, column: [*turns[:-1], behind]}
