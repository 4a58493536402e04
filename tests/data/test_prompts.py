"""What is typed is put as the run's rows were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.kit import build_tokenizer, chat
from ftune.data.formats import Format
from ftune.data.prompts import Prompting, prompting_of, read_prompts
from ftune.errors import DataError
from ftune.recipe.schema import ColumnMap, DataSource, DataSpec

Write = Callable[..., Path]

NESTED = {"prompt": "Q: {q} C: {meta.ctx}", "completion": "{ans}"}
WITHOUT = {"q": "a", "ans": "b", "meta": {}}
WITH = {"q": "c", "ans": "d", "meta": {"ctx": "C"}}


def of(path: Path, columns: dict[str, str] | None = None, trained: Format | None = None, **kit: Any) -> Prompting:
    source = DataSource(path=str(path), columns=None if columns is None else ColumnMap(**columns))
    return prompting_of(DataSpec(train=source), build_tokenizer(**kit), trained)


@pytest.mark.parametrize("rows", [[WITHOUT, WITH], [WITH, WITHOUT], [WITHOUT] * 50 + [WITH]], ids=len)
def test_a_place_that_the_first_row_lacks_is_one_that_a_later_row_has(rows: list[Any], write: Write) -> None:
    assert of(write(rows), NESTED).kind == "raw"
    assert of(write(rows), {"instruction": "q", "input": "meta.ctx", "output": "ans"}).kind == "chat"
    assert of(write(rows), {"instruction": "q", "input": "meta.ctx", "output": "ans"}, template=None).kind == "alpaca"


@pytest.mark.parametrize(
    ("trained", "kind"),
    [("text", "raw"), ("prompt_completion", "raw"), ("alpaca", "chat"), ("messages", "chat"), (None, "chat")],
)
def test_where_the_data_are_gone_the_run_tells(trained: Format | None, kind: str, tmp_path: Path) -> None:
    assert of(tmp_path / "gone.jsonl", trained=trained).kind == kind


def test_alpaca_without_a_template_where_the_data_are_gone(tmp_path: Path) -> None:
    assert of(tmp_path / "gone.jsonl", trained="alpaca", template=None).kind == "alpaca"
    assert of(tmp_path / "gone.jsonl", trained=None, template=None).kind == "raw"


@pytest.mark.parametrize(
    ("trained", "column"),
    [("text", "text"), ("prompt_completion", "prompt"), ("alpaca", "instruction"), ("messages", "messages")],
)
def test_rows_without_what_is_to_be_answered_are_told_which_column_it_is(
    trained: Format, column: str, write: Write
) -> None:
    spec = DataSpec(train=DataSource(path="gone.jsonl"))
    with pytest.raises(DataError, match=f"rows like the run's have the column `{column}`; found `question`$") as error:
        read_prompts(str(write([{"question": "a"}])), spec, trained, build_tokenizer())
    assert f"call the column that is to be answered `{column}`" in (error.value.help or "")


@pytest.mark.parametrize(
    "last",
    [
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None},
        {"role": "Assistant", "content": "an answer"},
        {"from": "ai", "value": " \n"},
        {"from": "chatgpt", "value": "an answer"},
    ],
)
def test_a_last_turn_of_the_assistant_is_what_is_to_be_answered(last: dict[str, Any], write: Write) -> None:
    tokenizer = build_tokenizer()
    spec = DataSpec(train=DataSource(path="gone.jsonl"))

    def prompts(*turns: Any) -> list[str]:
        _, items = read_prompts(str(write([{"messages": list(turns)}])), spec, "messages", tokenizer)
        return [tokenizer.decode(item.prompt_ids) for item in items]

    assert prompts(*chat("q"), last) == prompts(*chat("q"))
