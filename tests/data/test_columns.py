"""What the recipe says of columns, and what becomes of those that it does not speak of."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.kit import build_tokenizer, chat
from ftune.data.columns import ABSENT, value_at, written
from ftune.data.formats import convert
from ftune.data.leftover import unused_columns
from ftune.data.read import read_source
from ftune.data.sources import Rows
from ftune.data.tokenize import load_splits
from ftune.data.turns import Misfit
from ftune.errors import DataError, LocatedDataError
from ftune.recipe.columns import Field
from ftune.recipe.schema import ColumnMap, DataSource, DataSpec

Write = Callable[..., Path]
ANSWER = chat("", "b")[1:]


def source(path: Path, columns: dict[str, str] | None = None, **options: Any) -> DataSource:
    return DataSource(path=str(path), columns=None if columns is None else ColumnMap(**columns), **options)


def plain(path: Path, columns: dict[str, str] | None = None, **options: Any) -> list[tuple[str, str]]:
    """Prompt and completion of each row."""
    rows, format = read_source(source(path, columns, **options))
    return [(record.prompt, record.completion) for record in convert(rows, format, chat_template=False)]


CSV = 'text,label\n"Printer, again",hardware\nNA,007\n'


def test_columns_are_mapped_by_name(write: Write) -> None:
    path = write([{"question": "q", "answer": "a"}])
    assert plain(path, {"prompt": "question", "completion": "answer"}) == [("q", "a")]
    rows, format = read_source(source(write([{"body": "b", "id": 1}]), {"text": "body"}))
    assert (format, [dict(row) for _, row in rows]) == ("text", [{"text": "b"}])


def test_a_template_holds_values_as_they_are_written_in_a_csv(write: Write) -> None:
    columns = {"prompt": "Ticket: {text} Team:", "completion": " {label}"}
    assert plain(write(CSV, "t.csv"), columns) == [
        ("Ticket: Printer, again Team:", " hardware"),
        ("Ticket: NA Team:", " 007"),
    ]


@pytest.mark.parametrize(
    ("value", "template", "expected"),
    [
        ("é{x}", "{v}", "é{x}"),
        (7, "{v}", "7"),
        (True, "{v}", "true"),
        (None, "<{v}>", "<>"),
        ("", "<{v}>", "<>"),
        (3.5, "{v}", "3.5"),
        (3.0, "{v:d}", "3"),
        ("1234.5", "{v:,.2f}", "1,234.50"),
        (["a", 1], "{v}", '["a", 1]'),
        ({"a": {"b": ["x", "y"]}}, "{v.a.b.1}", "y"),
        ('say "hi"', '{{"team": {v:json}}}', '{"team": "say \\"hi\\""}'),
        ("x", "{{v}} {v}", "{v} x"),
    ],
)
def test_values_of_any_type_have_one_way_to_be_written(write: Write, value: Any, template: str, expected: str) -> None:
    path = write([{"v": value, "a": "b"}])
    assert plain(path, {"prompt": template, "completion": "a"}) == [(expected, "b")]


def test_a_key_that_a_row_lacks_is_empty_in_a_template(write: Write) -> None:
    path = write([{"q": "a", "more": "b", "a": "c"}, {"q": "d", "a": "e"}])
    assert plain(path, {"prompt": "{q}|{more}", "completion": "a"}) == [("a|b", "c"), ("d|", "e")]


def test_a_whole_number_that_a_table_made_a_float_is_refused_where_it_is(write: Write) -> None:
    from datasets import Dataset

    path = write("", "t.parquet")
    Dataset.from_dict({"q": ["a", "b"], "label": [1.0, None]}).to_parquet(str(path))
    with pytest.raises(DataError, match=r"t.parquet: row 1: `label`: found 1.0, which may stand for 1: write `{l"):
        plain(path, {"prompt": "q", "completion": "label"})
    assert plain(path, {"prompt": "q", "completion": "<{label:d}>"}) == [("a", "<1>"), ("b", "<>")]


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (0.5, "0.5"), (True, "true")])
def test_what_is_no_text_says_how_to_take_it_as_text(write: Write, value: Any, text: str) -> None:
    path = write([{"prompt": "a", "completion": value}])
    with pytest.raises(DataError, match=r"expected .*: `columns: {completion: completion}` takes it as text"):
        plain(path, {})
    assert plain(path, {"completion": "completion"}) == [("a", text)]


def test_dates_and_decimals_of_a_table_are_written_out(write: Write) -> None:
    from datasets import Dataset

    path = write("", "t.parquet")
    Dataset.from_dict({"day": [datetime.date(2024, 5, 1)], "a": ["b"]}).to_parquet(str(path))
    assert plain(path, {"prompt": "{day}", "completion": "a"}) == [("2024-05-01", "b")]


@pytest.mark.parametrize("template", ["{v:d}", "{v:.2f}"])
@pytest.mark.parametrize("value", ["x", True, "1e99999999", [1], "nan"])
def test_no_number_where_one_is_asked_for_is_located(write: Write, template: str, value: Any) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:1: `v`: found .* takes a (whole )?number"):
        plain(write([{"v": value, "a": "b"}]), {"prompt": template, "completion": "a"})


def test_attributes_are_out_of_reach(write: Write) -> None:
    path = write([{"v": "x", "a": "b"}])
    for template in ("{v.__class__}", "{v!r}", "{v[0]}", "{v:>10}", "{0}"):
        with pytest.raises(LocatedDataError, match="has no column"):
            plain(path, {"prompt": template, "completion": "a"})


def test_an_unknown_column_says_which_there_are(write: Write) -> None:
    path = write([{"ticket_text": "x", "team": "b"}])
    with pytest.raises(LocatedDataError) as caught:
        read_source(source(path, {"prompt": "Ticket: {ticket_txt}", "completion": "taem"}))
    places = caught.value.places
    assert [place for place, _, _ in places] == [
        ("data", "train", "columns", "prompt"),
        ("data", "train", "columns", "completion"),
    ]
    assert [message for _, message, _ in places] == [f"{path} has no column `{n}`" for n in ("ticket_txt", "taem")]
    assert places[0][2] == "did you mean `ticket_text`? The columns are `ticket_text`, `team`"


def test_lists_of_turns_are_mapped_as_they_are(write: Write) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = write([{"chat": chat("a", "b"), "functions": tools, "sys": "S"}])
    rows, format = read_source(source(path, {"messages": "chat", "tools": "functions", "system": "sys"}))
    (record,) = convert(rows, format, chat_template=True)
    assert [m["content"] for m in record.messages] == ["S", "a", "b"]  # type: ignore[union-attr]
    assert record.tools == tuple(tools)  # type: ignore[union-attr]


def test_an_instruction_with_the_same_system_message_in_every_row(write: Write) -> None:
    path = write([{"q": "a", "a": "b"}])
    columns = {"instruction": "q", "output": "a", "system": "You sort tickets."}
    rows, format = read_source(source(path, columns))
    (record,) = convert(rows, format, chat_template=True)
    assert [m["content"] for m in record.messages] == ["You sort tickets.", "a", "b"]  # type: ignore[union-attr]
    with pytest.raises(LocatedDataError, match="has no column `prompt`"):  # one word: a column that is not there
        read_source(source(path, {**columns, "system": "prompt"}))


def test_values_that_are_empty_in_a_text_are_told(write: Write) -> None:
    path = write([{"q": "a", "more": None, "a": "c"}, {"q": "d", "a": "e"}, {"q": "d", "more": "x", "a": "e"}])
    rows, _ = read_source(source(path, {"prompt": "{q} {more}", "completion": "a"}))
    assert rows.notes == ("data.train: empty in the text: `more` in 2 of 3 rows",)


def test_a_hub_data_set_is_looked_through_at_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    made = datasets.Dataset.from_list([{"q": "x", "a": "y", "id": n} for n in range(6)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    monkeypatch.setattr("ftune.data.leftover.HUB_ROWS", 4)
    mapping = ColumnMap(prompt="{q}", completion="a")
    rows, format = read_source(DataSource(path="org/set", columns=mapping))
    assert rows.notes == ("data.train: not used: `id`",)
    assert len(convert(rows, format, chat_template=False)) == 6
    with pytest.raises(DataError, match="no format fits the columns `q`, `a`, `id`"):
        read_source(DataSource(path="org/set"))


def test_a_file_without_a_header_says_that_its_first_line_is_one(write: Write) -> None:
    path = write("My printer is broken,hardware\nNo mail,software\n", "t.csv")
    with pytest.raises(DataError) as caught:
        read_source(source(path))
    assert (caught.value.help or "").startswith("the first line of the file names its columns; say in the recipe")
    with pytest.raises(DataError) as caught:
        read_source(source(write("a" * 100_000 + "\nb\n", "long.csv")))
    assert len(str(caught.value)) < 3_000
    with pytest.raises(LocatedDataError) as caught:
        read_source(source(path, {"prompt": "text", "completion": "label"}))
    assert "`My printer is broken`, `hardware`, named by its first line" in (caught.value.help or "")


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "q", "completion": "a", "system": "You are nice."},
        {"text": "{q} {a}", "tools": "t"},
        {"instruction": "q", "output": "a", "tools": "t"},
    ],
)
def test_what_is_mapped_and_has_no_place_is_refused(write: Write, columns: dict[str, str]) -> None:
    path = write([{"q": "x", "a": "y", "t": []}])
    with pytest.raises(LocatedDataError, match=r"`data.train.columns.(system|tools)`: .* has no place in format"):
        read_source(source(path, columns))


def test_a_value_nested_without_end_is_no_crash() -> None:
    deep: Any = "x"
    for _ in range(200_000):
        deep = [deep]
    rows = Rows([{"text": deep, "more": "y"}], ("text", "more"), ("d",), "", range(1))
    assert list(unused_columns(rows, ("text",))) == ["more"]
    with pytest.raises(Misfit, match="nested too deeply"):
        written(deep, Field("text"))


def test_a_text_without_bound_is_located(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftune.data.columns.MOST_CHARACTERS", 1_000)
    path = write([{"q": "x" * 100, "a": "b"}])
    assert len(plain(path, {"prompt": "{q}" * 10, "completion": "a"})[0][0]) == 1_000
    with pytest.raises(DataError, match="data.jsonl:1: the text with its columns has more than 1,000 characters"):
        plain(path, {"prompt": "{q}" * 11, "completion": "a"})


def test_half_of_a_mapping_says_what_is_lacking(write: Write) -> None:
    path = write([{"q": "x", "a": "y"}])
    for columns, lacking in (({"prompt": "q"}, "completion"), ({"output": "a"}, "instruction")):
        with pytest.raises(LocatedDataError, match=rf"`data.train.columns`: `{lacking}` is not given, and "):
            read_source(source(path, columns))


def test_a_misfit_names_the_files_column(write: Write) -> None:
    path = write([{"question": "q", "answer": None}])
    with pytest.raises(DataError, match=r"data.jsonl:1: `completion` \(from 'answer'\): found null"):
        plain(path, {"prompt": "question", "completion": "answer"})


def test_the_mapping_is_part_of_the_fingerprint(write: Write) -> None:
    path = write([{"q": "a", "a": "b"}])
    one, _ = read_source(source(path, {"prompt": "q", "completion": "a"}))
    other, _ = read_source(source(path, {"prompt": "{q}?", "completion": "a"}))
    assert one.fingerprint != other.fingerprint


# --- held-out rows ---


def test_held_out_rows_take_the_columns_of_the_training_rows(write: Write) -> None:
    train, held_out = write(CSV, "t.csv"), write(CSV, "e.csv")
    columns = ColumnMap(prompt="{text}", completion="label")
    spec = DataSpec(train=source(train, columns.given()), eval=source(held_out))
    splits = load_splits(spec, build_tokenizer(), seed=7)
    assert splits.eval is not None
    assert splits.eval.format == "prompt_completion"
    own = DataSpec(train=source(train, columns.given()), eval=source(held_out, {"text": "{text} {label}"}))
    assert load_splits(own, build_tokenizer(), seed=7).eval.format == "text"  # type: ignore[union-attr]
    other = write([{"prompt": "a", "completion": "b"}], "e.jsonl")
    with pytest.raises(LocatedDataError, match="`data.eval.completion`: .*e.jsonl has no column `label`"):
        load_splits(DataSpec(train=source(train, columns.given()), eval=source(other)), build_tokenizer(), seed=7)
    none = DataSpec(train=source(train, columns.given()), eval=source(other, {}))
    assert load_splits(none, build_tokenizer(), seed=7).eval is not None


# --- columns left over ---


def test_a_label_is_not_left_out_in_silence(write: Write) -> None:
    path = write(CSV, "t.csv")
    with pytest.raises(DataError) as caught:
        read_source(source(path))
    assert "the column `label` would not be used: format `text`, which was detected, takes `text`" in str(caught.value)
    assert "columns:\n          prompt: text\n          completion: label" in (caught.value.help or "")
    rows, format = read_source(source(path, format="text"))
    assert format == "text"
    assert rows.notes == ("data.train: not used: `label`",)


def test_columns_about_the_row_are_told_with_their_number(write: Write) -> None:
    path = write([{"text": "a", "id": 1, "Unnamed: 0": 0, "doc_id": "x", "url": None}, {"text": "b", "id": 2}])
    rows, _ = read_source(source(path))
    assert rows.notes == (
        "data.train: not used: `id`, `Unnamed: 0` (in 1 of the 2 rows), `doc_id` (in 1 of the 2 rows)",
    )


def test_a_column_that_repeats_what_is_used_is_no_loss(write: Write) -> None:
    rendered = {"instruction": "Add.", "input": "", "output": "3", "text": "### Add.\n### 3"}
    assert read_source(source(write([rendered])))[0].notes == ()
    ultrachat = {"prompt": "a", "messages": chat("a", "b")}
    assert read_source(source(write([ultrachat])))[0].notes == ()
    with pytest.raises(DataError, match="the column `prompt` would not be used"):
        read_source(source(write([ultrachat, {**ultrachat, "prompt": "c"}])))


@pytest.mark.parametrize(
    ("row", "proposed"),
    [
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}),
        ({"body": "a"}, {"text": "body"}),
        ({"chosen": "a", "rejected": "b"}, {"text": "chosen"}),
        ({"query": "q", "response": "r", "history": [["a", "b"]]}, {"instruction": "query", "history": "history"}),
        ({"id": 1, "title": "a", "body": "b", "label": "c"}, {"prompt": '"title: {title}\\nbody: {body}"'}),
        ({"turns": chat("a", "b")}, {"messages": "turns"}),
        ({"system_prompt": "s", "question": "a", "response": "b"}, {"instruction": "question", "output": "response"}),
        ({"text": "a", "chosen": "b", "rejected": "c"}, {"prompt": "text", "completion": "chosen"}),
        ({"messages": chat("a", "b"), "functions": [{"name": "f"}]}, {"messages": "messages", "tools": "functions"}),
        ({"prompt": chat("a"), "chosen": ANSWER, "rejected": ANSWER}, {"prompt": "prompt", "completion": "chosen"}),
        ({"chosen": chat("a", "b"), "rejected": chat("a", "c")}, {"messages": "chosen"}),
        (
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {},
            },
            {"prompt": "conversations", "completion": "chosen"},
        ),
        (
            {"input": {"messages": chat("a")}, "preferred_output": ANSWER, "non_preferred_output": ANSWER},
            {"prompt": "input.messages", "completion": "preferred_output"},
        ),
        ({"input": chat("a"), "output": ANSWER}, {"prompt": "input", "completion": "output"}),
        ({"data": {"messages": chat("a", "b")}}, {"messages": "data.messages"}),
        ({"options": [{"a": "b"}], "question": "a", "answer": "b"}, {"completion": "answer"}),
    ],
)
def test_the_refusal_proposes_a_mapping_that_works(write: Write, row: dict[str, Any], proposed: dict[str, str]) -> None:
    import yaml

    path = write([row])
    with pytest.raises(DataError) as caught:
        read_source(source(path))
    for field, value in proposed.items():
        assert f"\n          {field}: {value}\n" in f"{caught.value.help}\n"
    lines = [line for line in (caught.value.help or "").splitlines() if line.startswith("    ")]
    copied = yaml.safe_load("\n".join(lines))["data"]["train"]
    rows, format = read_source(DataSource.model_validate(copied))
    assert convert(rows, format, chat_template=True)


@pytest.mark.parametrize(
    ("rows", "help"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "ftune trains on one answer a row, not on preferences"),
        ([{"messages": chat("a", "b"), "rejected_response": "c"}], "take the preferred one; write `format: messages`"),
        (
            [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}],
            "`label` says which answers are good: leave out the rows where it is false, then write `format: prompt_",
        ),
        (
            [{"messages": chat("a", "b"), "label": "False"}],
            "leave out the rows where it is false, then write `format: m",
        ),
        (
            [{"messages": chat("<image>a", "b"), "images": ["a.png"]}],
            "trains on text only: leave out the rows with `im",
        ),
        ([{"input_ids": [1, 2], "labels": [1, 2]}], "give the texts or conversations that these were made from"),
        (chat("a", "b"), "each row is one turn: write a whole conversation as a row"),
        ([{"from": "human", "value": "a"}], "each row is one turn: write a whole conversation as a row"),
    ],
)
def test_rows_of_another_kind_of_training_say_what_to_do(write: Write, rows: list[dict[str, Any]], help: str) -> None:
    with pytest.raises(DataError) as caught:
        read_source(source(write(rows)))
    assert help in (caught.value.help or "")


def test_rows_that_lack_the_column_of_the_others_are_named(write: Write) -> None:
    others = [{"prompt": "a", "completion": "b"}, {"conversations": chat("a", "b")}]
    rows, format = read_source(source(write([{"messages": chat("a", "b")}, *others])))
    with pytest.raises(DataError) as caught:
        convert(rows, format, chat_template=True)
    assert "2: the column `messages` is missing; this row has `prompt`, `completion`" in caught.value.message
    assert "3: the column `messages` is missing; this row has `conversations`" in caught.value.message


def test_a_mapping_tells_what_it_leaves_out(write: Write) -> None:
    path = write([{"q": "a", "a": "b", "score": 3}])
    rows, _ = read_source(source(path, {"prompt": "q", "completion": "a"}))
    assert rows.notes == ("data.train: not used: `score`",)


def test_a_column_that_no_mapping_has_a_place_for_asks_for_the_format(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        read_source(source(write([{"messages": chat("a", "b"), "quality": 3}])))
    assert caught.value.help == "write `format: messages` in `data.train`, to go on without it"


def test_system_beside_strings_is_not_dropped(write: Write) -> None:
    with pytest.raises(DataError, match="the column `system` would not be used"):
        read_source(source(write([{"prompt": "a", "completion": "b", "system": "s"}])))


def test_a_conversation_in_a_cell_is_read(write: Write) -> None:
    cell = json.dumps(chat("a", "b")).replace('"', '""')
    rows, format = read_source(source(write(f'messages\n"{cell}"\n', "t.csv")))
    (record,) = convert(rows, format, chat_template=True)
    assert [m["content"] for m in record.messages] == ["a", "b"]  # type: ignore[union-attr]


def test_a_list_index_of_any_length_is_no_traceback() -> None:
    assert value_at({"a": ["x"]}, "a.0") == "x"
    assert value_at({"a": ["x"]}, "a." + "9" * 5_000) is ABSENT
