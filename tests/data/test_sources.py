"""Reading files and hub data sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.kit import TEMPLATES, build_tokenizer
from ftune.data.sources import load_rows
from ftune.data.tokenize import generation_items, tokenize_split
from ftune.errors import DataError
from ftune.recipe.schema import DataSource, DataSpec

Write = Callable[..., Path]
ROWS = [{"text": "one"}, {"text": "two\u2028still two"}, {"text": "three"}]


def read(path: Path, **options: object) -> list[dict]:
    return [dict(row) for _, row in load_rows(DataSource(path=str(path), **options))]


def test_every_kind_of_file_gives_the_same_rows(write: Write) -> None:
    from datasets import Dataset

    parquet = write("", "rows.parquet")
    Dataset.from_list(ROWS).to_parquet(str(parquet))
    files = [
        write(ROWS, "rows.jsonl"),
        write(json.dumps(ROWS, indent=2), "rows.json"),
        write("".join(json.dumps(row) + "\n" for row in ROWS), "lines.json"),
        write('text\none\ntwo\u2028still two\n"three"\n', "rows.csv"),
        write('text;n\none;\ntwo\u2028still two;\n"three";\n'.replace(";n", ";").replace(";", "\t"), "rows.tsv"),
        parquet,
    ]
    for file in files:
        assert read(file) == ROWS, file.name
    assert read(write("one\n\ntwo\u2028still two\r\nthree", "rows.txt"), split_on="line") == ROWS


def test_a_row_knows_its_file_and_line(write: Write) -> None:
    write('{"text": "a"}\n\n{"text": "b"}\n', "d/1.jsonl")
    second = write('{"text": "c"}\n', "d/2.jsonl")
    rows = load_rows(DataSource(path=str(second.parent)))
    assert [rows.where(n) for n, _ in rows] == [
        f"{second.parent}/1.jsonl:1",
        f"{second.parent}/1.jsonl:3",
        f"{second.parent}/2.jsonl:1",
    ]
    listed = load_rows(DataSource(path=str(write('[\n {"text": "a"},\n\n {"text":\n "b"}]', "x.json"))))
    assert [listed.where(n).rsplit(":", 1)[1] for n, _ in listed] == ["2", "4"]
    table = load_rows(DataSource(path=str(write('text,n\n"a\nb",1\nc,2\n', "x.csv"))))
    assert [table.where(n).rsplit(":", 1)[1] for n, _ in table] == ["2", "4"]
    assert [row for _, row in table] == [{"text": "a\nb", "n": "1"}, {"text": "c", "n": "2"}]


def test_parquet_rows_are_numbered_per_file(write: Write) -> None:
    from datasets import Dataset

    for name in ("d/a.parquet", "d/b.parquet"):
        Dataset.from_list(ROWS[:2]).to_parquet(str(write("", name)))
    directory = write("", "d/.hidden.jsonl").parent
    rows = load_rows(DataSource(path=str(directory)))
    assert len(rows) == 4
    assert rows.where(3) == f"{directory}/b.parquet: row 2"


def test_the_fingerprint_is_of_the_bytes(write: Write) -> None:
    file = write(ROWS)
    assert load_rows(DataSource(path=str(file))).fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()


def test_max_examples_reads_no_further(write: Write) -> None:
    file = write('{"text": "a"}\n{"text": "b"}\nnot json\n')
    assert len(read(file, max_examples=2)) == 2
    with pytest.raises(DataError, match=r":3:1: not valid JSON"):
        read(file, max_examples=3)


def test_a_missing_key_is_not_a_null(write: Write) -> None:
    rows = load_rows(DataSource(path=str(write('{"text": "a"}\n{"note": null}\n'))))
    assert rows.columns == ("text", "note")
    assert [dict(row) for _, row in rows] == [{"text": "a"}, {"note": None}]


def test_a_byte_order_mark_is_dropped(write: Write) -> None:
    assert read(write(b"\xef\xbb\xbf" + b'{"text": "a"}\n')) == [{"text": "a"}]
    assert read(write(b"\xef\xbb\xbf" + b"text\na\n", "x.csv")) == [{"text": "a"}]


def test_select_keeps_the_numbers(write: Write) -> None:
    rows = load_rows(DataSource(path=str(write(ROWS))))
    part = rows.select([2, 0])
    assert [(n, row["text"]) for n, row in part] == [(0, "one"), (2, "three")]
    assert len(part) == 2
    assert part.where(2).endswith(":3")


def test_a_data_set_that_is_not_reachable_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'no-such-org/no-such-set': neither a local file") as caught:
        load_rows(DataSource(path="no-such-org/no-such-set"))
    assert "HF_HUB_OFFLINE" in (caught.value.help or "")


def test_a_hub_data_set_keeps_its_fingerprint_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def load_dataset(path: str, name: str | None, **options: object) -> datasets.Dataset:
        asked.update(options, path=path, name=name)
        if options["split"] != "test":
            raise ValueError(f'Unknown split "{options["split"]}". Should be one of ["test"].')
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = DataSource(path="org/set", subset="en", split="test", revision="v1", max_examples=2)
    rows = load_rows(source)
    assert asked == {"path": "org/set", "name": "en", "split": "test", "revision": "v1"}
    assert [row["text"] for _, row in rows] == ["one", "two\u2028still two"]
    assert rows.where(1) == "org/set (en), split test: row 2"
    assert rows.fingerprint == load_rows(source).fingerprint
    with pytest.raises(DataError, match="Unknown split"):
        load_rows(DataSource(path="org/set"))


def test_nesting_without_end_is_no_crash(write: Write) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    for name in ("deep.jsonl", "deep.json"):
        with pytest.raises(DataError, match=f"{name}:1: JSON nested too deeply"):
            read(write(f'{{"text": {deep}}}\n' if name == "deep.jsonl" else f"[{deep}]", name))


@pytest.mark.parametrize("name", ["n.jsonl", "n.json"])
def test_a_number_too_long_to_convert_is_located(write: Write, name: str) -> None:
    rows = ['{"text": "a"}', f'{{"text": "b", "n": {"9" * 5000}}}']
    text = "\n".join(rows) if name == "n.jsonl" else "[" + ",\n".join(rows) + "]"
    with pytest.raises(DataError, match=rf"{name}:2: an integer of more than \d+ digits"):
        read(write(text, name))


@pytest.mark.parametrize("name", ["s.jsonl", "s.json"])
@pytest.mark.parametrize(
    "row",
    [r'{"text": "x \ud83d y"}', r'{"text": "\uDE00\uD83D"}', r'{"a": [{"b": "\udfff"}]}', r'{"\ud800": "key"}'],
)
def test_half_a_surrogate_pair_is_located(write: Write, name: str, row: str) -> None:
    rows = ['{"text": "a"}', row]
    text = "\n".join(rows) if name == "s.jsonl" else "[" + ",\n".join(rows) + "]"
    with pytest.raises(DataError, match=rf"{name}:2: .*half of a surrogate pair"):
        read(write(text, name))


def test_a_whole_surrogate_pair_and_an_escaped_backslash_are_text(write: Write) -> None:
    file = write(r'{"text": "\ud83d\ude00 \\ud83d"}')
    assert read(file) == [{"text": "\U0001f600 \\ud83d"}]


def test_one_object_with_half_a_surrogate_pair_as_key_gives_a_message_that_prints(write: Write) -> None:
    with pytest.raises(DataError, match="one object with the keys") as caught:
        read(write(r'{"\ud800": 1}', "one.json"))
    caught.value.render().encode()


def test_half_a_surrogate_pair_inside_a_tools_string_is_located(write: Write) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write([{"messages": turns}, {"messages": turns, "tools": r'[{"name": "\ud83d"}]'}], "tools.jsonl")
    spec = DataSpec(train=DataSource(path=str(file)))
    tokenizer = build_tokenizer("{% for t in tools or [] %}{{ t['name'] }}{% endfor %}" + TEMPLATES["chatml"])
    rows = load_rows(spec.train)
    with pytest.raises(DataError, match=r"tools\.jsonl:2: .*half of a surrogate pair"):
        tokenize_split(rows, tokenizer, spec, "messages")
    with pytest.raises(DataError, match=r"tools\.jsonl:2: .*half of a surrogate pair"):
        generation_items(rows, tokenizer, spec, "messages")


def test_a_csv_cell_may_be_long(write: Write) -> None:
    long = "word " * 40_000
    assert read(write(f'text\n"{long}"\nb\n', "long.csv")) == [{"text": long}, {"text": "b"}]


def test_a_hub_data_set_that_is_a_script_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: object, **options: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"data set 'org/set': Dataset scripts .* found set\.py") as caught:
        load_rows(DataSource(path="org/set"))
    assert "refs/convert/parquet" in (caught.value.help or "")


def test_a_broken_parquet_file_is_named(write: Write) -> None:
    with pytest.raises(DataError, match=r"x\.parquet: not a readable parquet file: .*magic"):
        read(write("PAR1 not at all", "x.parquet"))


def test_a_parquet_file_without_rows_has_none(write: Write) -> None:
    from datasets import Dataset

    path = write("", "x.parquet")
    Dataset.from_dict({"text": ["a"]}).select([]).to_parquet(str(path))
    with pytest.raises(DataError, match=r"x\.parquet: no rows in this file"):
        read(path)


@given(st.lists(st.dictionaries(st.text(), st.text() | st.none() | st.integers()), min_size=1, max_size=5))
def test_json_and_jsonl_agree_on_any_strings(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    place = tmp_path_factory.mktemp("rows")
    (place / "a.jsonl").write_text("".join(json.dumps(r, ensure_ascii=True) + "\n" for r in rows))
    (place / "a.json").write_text(json.dumps(rows, ensure_ascii=True, indent=1))
    assert read(place / "a.jsonl") == read(place / "a.json") == rows


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.jsonl": '{"text": "a"}\n{"text": b}\n'}, r"train\.jsonl: JSON parse error: Invalid value\. in row 1"),
        ({"a.jsonl": '{"text": "a"}\n', "b.jsonl": '{"other": 1}\n'}, "column names don't match|the same columns"),
    ],
)
def test_a_malformed_hub_data_set_is_one_clear_error(
    files: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    for name, text in files.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text(text)
    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None, **options: object) -> datasets.Dataset:
        return original(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(DataSource(path="org/set"))
    assert caught.value.message.startswith("data set 'org/set': ")
    assert "\n" not in caught.value.message
    assert "by path" in (caught.value.help or "")


@pytest.mark.parametrize("name", ["n.jsonl", "n.json"])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text": "b", "n": NaN}', "NaN is no JSON"),
        ('{"text": "b", "n": [-Infinity]}', "-Infinity is no JSON"),
        ('{"text": "b", "text": "c"}', "an object has the key 'text' twice"),
        ('{"text": "b", "x": [{"a": 1, "b": 2, "a": 1}]}', "an object has the key 'a' twice"),
    ],
)
def test_what_other_readers_refuse_or_read_otherwise_is_located(write: Write, name: str, row: str, said: str) -> None:
    rows = ['{"text": "a"}', row]
    text = "\n".join(rows) if name == "n.jsonl" else "[" + ",\n".join(rows) + "]"
    with pytest.raises(DataError, match=f"{name}:2: {said}"):
        read(write(text, name))


def test_a_parquet_cell_that_cannot_be_decoded_is_located(write: Write) -> None:
    pytest.importorskip("PIL", reason="datasets encodes images with it, and does not ask for it")
    from datasets import Dataset, Features, Image, Value

    path = write("", "i.parquet")
    features = Features({"text": Value("string"), "picture": Image()})
    cells = [None, {"bytes": b"no picture", "path": None}]
    Dataset.from_dict({"text": ["a", "b"], "picture": cells}, features=features).to_parquet(str(path))
    with pytest.raises(DataError, match=r"i.parquet: row \d: cannot be decoded"):
        read(path)


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\u202eb", "a\ud800b"])
def test_no_message_holds_what_a_terminal_obeys(text: str) -> None:
    shown = DataError(f"one\n{text}").render()
    assert shown.startswith("error: one\na\\")
    assert not set(shown) & {"\x1b", "\u202e", "\ud800"}
