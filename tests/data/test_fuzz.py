"""Bad data files: each is tokenized, or refused with a message that names the file and, where one is at fault, the row.

A few hundred cases run with the fast tests; ``pytest tests/data/test_fuzz.py --hypothesis-profile=fuzz`` runs
thousands.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.kit import build_tokenizer
from ftune.data.tokenize import load_splits
from ftune.errors import FtuneError
from ftune.recipe.schema import DataSource, DataSpec

TURNS = [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "yes"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
ROWS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"messages": TURNS, "tools": json.dumps(TOOLS)},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, TURNS[1]], "tools": TOOLS},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}], "system": "be brief"},
    {"prompt": "hello", "completion": " yes"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"instruction": "say", "input": "hello", "output": "yes", "system": None},
    {"text": "hello"},
]
ROW = st.sampled_from(ROWS)
TOKENIZERS = {name: build_tokenizer(name) for name in ("chatml", "marks", "bare", "alternates", None)}
# Of the whole file; everything else has to name the row.
OF_THE_FILE = (
    "no rows in this file|is UTF-16|is packed|expected a JSON list of objects, found one object|"
    "no format fits the columns|would not be used|nothing to train on|needs a chat template|"
    "not a readable parquet file|one row cannot be split"
)


@pytest.fixture(autouse=True, scope="module")
def _somewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with contextlib.chdir(tmp_path_factory.mktemp("fuzz")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTUNE_CACHE_GIB", "0")
        yield


def tokenizes_or_refuses(content: bytes | None, kind: str, template: str | None = "chatml", **options: Any) -> bool:
    """Read, convert and tokenize a file; whether that went well, and holds that a refusal says where and what."""
    name = f"d.{kind}"
    if content is not None:
        Path(name).write_bytes(content)
    try:
        splits = load_splits(DataSpec(train=DataSource(path=name), **options), TOKENIZERS[template], seed=7)
    except FtuneError as error:
        text = error.render()
        text.encode()
        assert name in text
        assert re.search(rf"{re.escape(name)}(:\d+|: row \d+)", text) or re.search(OF_THE_FILE, text), text
        assert not any(character in text for character in "\x00\x07\x1b\u202e"), text
        assert len(text) < 20_000, f"a message of {len(text)} characters"
        return False
    assert len(splits.train.examples) > 0
    return True


# --- values ---

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**4000), 2**63, float("nan"), float("inf"), -0.0, 1e308]),
    st.text(max_size=8),
    st.sampled_from(
        ["", " ", "\x00", "\x1b[2J", "\u202e", "\r", "a\u2028b", "<|im_end|>", "hello" * 200, "\U0001f600"]
    ),
    st.sampled_from(["assistant", "user", "tool", "system", "function", "text"]),
)
KEYS = st.sampled_from(
    ["messages", "role", "content", "from", "value", "tools", "tool_calls", "text", "type", "prompt", "", "\x1b[2J"]
)
JUNK = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@st.composite
def changed_rows(draw: st.DrawFn) -> dict[str, Any]:
    """A valid row with something in it replaced, removed, added or doubled."""
    row = json.loads(json.dumps(draw(ROW)))
    for _ in range(draw(st.integers(1, 2))):
        at: Any = row
        while True:
            inside = [
                value for value in (at.values() if isinstance(at, dict) else at) if isinstance(value, dict | list)
            ]
            if not inside or draw(st.booleans()):
                break
            at = draw(st.sampled_from(inside))
        places = list(at) if isinstance(at, dict) else list(range(len(at)))
        what = draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "add" or not places:
            if isinstance(at, dict):
                at[draw(KEYS)] = draw(JUNK)
            else:
                at.insert(0, draw(JUNK))
        elif what == "remove":
            del at[draw(st.sampled_from(places))]
        else:
            at[draw(st.sampled_from(places))] = draw(JUNK)
    return row


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@given(changed_rows(), ROW, st.sampled_from(list(TOKENIZERS)), st.sampled_from(["jsonl", "json"]))
def test_rows_with_other_values(row: dict[str, Any], first: dict[str, Any], template: str | None, kind: str) -> None:
    rows = [first, row] if set(first) == set(row) else [row]
    content = jsonl(rows) if kind == "jsonl" else json.dumps(rows, ensure_ascii=False).encode(errors="surrogatepass")
    tokenizes_or_refuses(content, kind, template)


@given(st.lists(ROW, min_size=1, max_size=3), st.integers(8, 40), st.sampled_from(["error", "skip", "truncate"]))
@settings(max_examples=30)
def test_rows_longer_than_the_context(rows: list[Any], length: int, too_long: str) -> None:
    tokenizes_or_refuses(jsonl(rows), "jsonl", max_length=length, too_long=too_long)
    tokenizes_or_refuses(jsonl(rows), "jsonl", max_length=length, too_long=too_long, eval_fraction=0.5)
    tokenizes_or_refuses(b'{"text": "a"}\n{"text": "ll"}\n', "jsonl", max_length=length, train_on="all")


# --- text ---


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


# Around the depths at which a decoder, repr, pickle and a template give up, and far behind them.
DEPTHS = (50, 190, 240, 320, 480, 900, 985, 3_000, 10_000, 100_000)
VALUES = st.one_of(
    st.sampled_from(
        ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5_000, "-" + "9" * 5_000, "null", "[", "{", "]", ""]
    ),
    st.sampled_from(
        ['"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\x00"', '"\t"', "'a'", '"', "\ufeff", "\u2028", "//"]
    ),
    st.sampled_from(
        ['{"a": 1, "a": 2}', '"role"', '"content"', '"messages"', '"text"', '"tools"', ",", ":", "\r", "\n"]
    ),
    st.builds(nested, st.sampled_from(DEPTHS)),
    st.builds(nested, st.sampled_from(DEPTHS), st.just('{"a":'), st.just("}")),
    # Cut short, and behind a string that holds JSON.
    st.builds(nested, st.sampled_from(DEPTHS), closing=st.just("")),
    st.builds(nested, st.sampled_from(DEPTHS)).map(json.dumps),
)
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+')


@st.composite
def changed_texts(draw: st.DrawFn) -> bytes:
    """A file of JSON rows with tokens replaced, doubled or removed, and perhaps other line ends."""
    rows = draw(st.lists(ROW, min_size=1, max_size=3))
    text = jsonl(rows).decode() if draw(st.booleans()) else json.dumps(rows)
    for _ in range(draw(st.integers(1, 2))):
        tokens = list(TOKEN.finditer(text))
        found = draw(st.sampled_from(tokens))
        value = draw(VALUES | st.just(found[0] * 2) | st.just(f"{found[0]},{found[0]}"))
        text = text[: found.start()] + value + text[found.end() :]
        if len(text) > 10_000:
            break
    end = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\x00", "\x85", ""]))
    return text.replace("\n", end).encode()


@given(changed_texts(), st.sampled_from(["jsonl", "json", "csv", "txt"]))
def test_texts(content: bytes, kind: str) -> None:
    tokenizes_or_refuses(content, kind)


WRAPPED = st.sampled_from(
    [jsonl(ROWS[:1]), jsonl(ROWS[-1:]), json.dumps(ROWS[4:5]).encode(), b"prompt,completion\nhello, yes\n", b"", b"\n"]
)
PARTS = st.sampled_from(
    [
        b"\x00",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\r",
        b'"',
        b",",
        b"\x1b[2J",
        b"\\ud800",
    ]
)


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    """A small file with bytes put in, cut out or encoded otherwise."""
    content = draw(WRAPPED)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(PARTS | st.binary(max_size=3)) + content[at + draw(st.integers(0, 3)) :]
    how = draw(st.sampled_from(["as is", "as is", "as is", "gzip", "utf-16", "utf-16-le", "utf-32", "cut"]))
    if how == "gzip":
        return gzip.compress(content, mtime=0)
    if how == "cut":
        return content[: draw(st.integers(0, len(content)))]
    return content if how == "as is" else content.decode("utf-8", "replace").encode(how)


@given(changed_bytes(), st.sampled_from(["jsonl", "json", "csv", "txt", "parquet"]))
def test_bytes(content: bytes, kind: str) -> None:
    tokenizes_or_refuses(content, kind)


CELLS = st.text(max_size=5) | st.sampled_from(["", "\r", "\n", '"', '"a', "a,b", "\x00", "\x1b[2J", "a" * 140_000])
COLUMNS = st.lists(KEYS | st.sampled_from(["completion", "instruction", "output"]), max_size=4)


@given(COLUMNS, st.lists(st.lists(CELLS, max_size=4), max_size=3), st.sampled_from(["\n", "\r\n", "\r"]))
def test_tables_of_text(header: list[str], rows: list[list[str]], end: str) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=end).writerows([header, *rows])
    tokenizes_or_refuses(file.getvalue().encode("utf-8", "replace"), "csv")


# --- parquet ---

ODD = [
    b"\xff",
    b"hello",
    decimal.Decimal("1.5"),
    datetime.datetime(2024, 1, 1),
    datetime.date(1, 1, 1),
    datetime.timedelta(days=10**5),
    datetime.time(1),
    None,
    float("nan"),
    2**63 - 1,
    "hello",
    "\x00",
    [],
    [None],
    [[["a"]]],
    {"a": None},
    TURNS,
    [TURNS[0], None, TURNS[1]],
    [{"role": b"user", "content": "a"}],
]


@given(
    st.lists(st.sampled_from(["messages", "text", "prompt", "completion", "tools", "\x1b[2J"]), max_size=3),
    st.lists(st.sampled_from(ODD), min_size=3, max_size=3),
    st.integers(0, 2),
)
@settings(max_examples=20)
def test_tables_with_odd_types(names: list[str], values: list[Any], count: int) -> None:
    import pyarrow
    import pyarrow.parquet

    arrays = [pyarrow.array([value] * count) for value in values[: len(names)]]
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=names), "d.parquet")
    tokenizes_or_refuses(None, "parquet")
