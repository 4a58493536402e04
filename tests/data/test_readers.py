"""Shapes of files: texts and their documents, tables as other programs write them, JSON over several lines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftune.data.sources import load_rows
from ftune.errors import DataError
from ftune.recipe.schema import DataSource

Write = Callable[..., Path]


def read(path: Path, **options: Any) -> list[tuple[dict[str, Any], str]]:
    """Each row with its place: the line, or ``row N``."""
    rows = load_rows(DataSource(path=str(path), **options))
    return [(dict(row), rows.where(number).rsplit(":", 1)[1].strip()) for number, row in rows]


def texts(path: Path, **options: Any) -> list[tuple[str, str]]:
    return [(row["text"], line) for row, line in read(path, **options)]


# --- texts ---


@pytest.mark.parametrize(
    ("split_on", "expected"),
    [
        (None, [("a\nb\n\n \n  c\nd", "2")]),
        ("line", [("a", "2"), ("b", "3"), ("  c", "6"), ("d", "7")]),
        ("blank_line", [("a\nb", "2"), ("  c\nd", "6")]),
        ("\nd", [("a\nb\n\n \n  c", "2")]),
        ("c", [("a\nb\n\n \n  ", "2"), ("d", "7")]),
    ],
)
def test_a_text_is_one_document_or_cut_where_the_recipe_says(
    write: Write, split_on: str | None, expected: list[tuple[str, str]]
) -> None:
    text = "\na\nb\n\n \n  c\nd\n"
    assert texts(write(text, "t.txt"), split_on=split_on) == expected
    assert texts(write(text.replace("\n", "\r\n"), "t.txt"), split_on=split_on) == expected


def test_eighty_files_are_eighty_documents(write: Write) -> None:
    for number in range(80):
        file = write(f"{number}\n" * 90, f"d/{number}.txt")
    rows = load_rows(DataSource(path=str(file.parent)))
    assert (len(rows), len(rows.origin)) == (80, 80)


def test_a_separator_that_is_nowhere_is_no_slip(write: Write) -> None:
    with pytest.raises(DataError, match=r"t.txt: `split_on` names the separator '====', which is nowhere in it"):
        texts(write("a\n---\nb", "t.txt"), split_on="====")
    assert texts(write("a\r\n---\r\n", "t.txt"), split_on="\n---\n") == [("a", "1")]


def test_where_texts_are_cut_is_part_of_the_fingerprint(write: Write) -> None:
    path = str(write("a\nb", "t.txt"))
    assert load_rows(DataSource(path=path)).fingerprint != load_rows(DataSource(path=path, split_on="line")).fingerprint


# --- tables ---


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'text,label\n"a, b",007\nNA,null\n'),
        ("t.csv", '\ufefftext,label\r\n"a, b",007\r\nNA,null\r\n'),
        ("t.csv", "text;label\na, b;007\nNA;null\n"),
        ("t.csv", "sep=;\r\ntext;label\r\na, b;007\r\nNA;null\r\n"),
        ("t.csv", "text|label\na, b|007\nNA|null\n"),
        ("t.csv", "text\tlabel\na, b\t007\nNA\tnull\n"),
        ("t.csv", 'text, label\n"a, b", 007\nNA, null\n'),
        ("t.csv", 'text,label,,\n"a, b",007,,\nNA,null,,\n'),
        ("t.csv", '\n\ntext,label\n"a, b",007\n\nNA,null\n'),
        ("t.csv", 'text,label\r"a, b",007\rNA,null\r'),
        ("t.tsv", "text\tlabel\na, b\t007\nNA\tnull\n"),
        ("t.tsv", '"text"\t"label"\n"a, b"\t007\nNA\tnull\n'),
    ],
)
def test_a_table_is_read_as_it_was_meant_and_values_stay_text(write: Write, name: str, text: str) -> None:
    rows = [row for row, _ in read(write(text, name))]
    assert rows == [{"text": "a, b", "label": "007"}, {"text": "NA", "label": "null"}]


def test_quotes_are_text_in_a_tsv_that_has_no_quoted_values(write: Write) -> None:
    path = write('text\tlabel\n"No" he said\tx\n5" pipe\ty\n', "t.tsv")
    assert [row["text"] for row, _ in read(path)] == ['"No" he said', '5" pipe']


def test_a_semicolon_in_a_name_is_no_separator_beside_commas(write: Write) -> None:
    assert read(write("a;b,c\n1;2,3\n", "t.csv")) == [({"a;b": "1;2", "c": "3"}, "2")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,label\na\n", r"t.csv:2: 1 values under a header of 2 columns"),
        ("text,label\na,b,c\n", r"t.csv:2: 3 values under a header of 2 columns"),
        ("text,label,\na,b,c\n", r"t.csv:2: 3 values under a header of 2 columns"),
        ("text,text\na,b\n", r"t.csv:1: the header names the column 'text' twice"),
        ('"text,label\n', r"t.csv:1: not valid CSV"),
        ("text,label\n", "t.csv: no rows in this file"),
        ("", "t.csv: no rows in this file"),
    ],
)
def test_a_broken_table_is_located(write: Write, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(write(text, "t.csv"))


def test_windows_bytes_say_how_to_save_them(write: Write) -> None:
    with pytest.raises(DataError, match=r"t.csv:2: not valid UTF-8 \(byte 0xe9\)") as caught:
        read(write("text,label\ncafé,x\n".encode("cp1252"), "t.csv"))
    assert "iconv -f cp1252 -t utf-8 t.csv" in (caught.value.help or "")


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.txt"])
def test_a_packed_file_under_another_name_is_told(write: Write, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: the file is packed \(gzip\)") as caught:
        read(write(gzip.compress(b'{"text": "a"}'), name))
    assert "unpack it" in (caught.value.help or "")


# --- JSON ---


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_in_every_shape(write: Write, name: str) -> None:
    rows = [{"text": "a"}, {"text": "b {"}]
    lines = [json.dumps(row) for row in rows]
    for text, places in {
        "\n".join(lines): "12",
        "\r\n".join(lines) + "\r\n\r\n": "12",
        "\ufeff" + "\n".join(lines): "12",
        json.dumps(rows): "11",
        json.dumps(rows, indent=1): "25",
        "\n".join(json.dumps(row, indent=1) for row in rows): "14",
        "{\n" + lines[0][1:] + "\n{\n" + lines[1][1:]: "13",
    }.items():
        assert [(row, line) for row, line in read(write(text, name))] == list(zip(rows, places, strict=True)), text


def test_one_object_is_a_row_of_a_jsonl_and_no_list(write: Write) -> None:
    assert read(write('{"text": "a"}', "x.jsonl")) == [({"text": "a"}, "1")]
    with pytest.raises(DataError, match="found one object with the keys text") as caught:
        read(write('{"text": "a"}', "x.json"))
    assert "name the file .jsonl" in (caught.value.help or "")


@pytest.mark.parametrize("text", ['{\n"text": "a"\n}\n{\n"text" "b"\n}\n', '{\n"text": "a",\n', "{\n\n"])
def test_a_mistake_in_an_object_over_lines_is_located(write: Write, text: str) -> None:
    with pytest.raises(DataError, match=r"x.jsonl:\d+:\d+: not valid JSON"):
        read(write(text, "x.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "help"),
    [
        ("t.jsonl", b'[{"role": "user"}]\n[{"role": "user"}]\n', '{"messages": [...]} for a conversation'),
        ("t.json", b'[[{"role": "user"}]]', '{"messages": [...]} for a conversation'),
        ("t.jsonl", b'"words"\n', '{"text": "..."} for a text'),
    ],
)
def test_what_holds_no_rows_says_what_to_do(name: str, content: bytes, help: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert help in (caught.value.help or "")
