"""Tokens that are kept: the same as new ones, and never those of anything else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from data.kit import build_tokenizer, chat
from ftune.data import token_cache, tokenize
from ftune.data.chat import load_template
from ftune.data.encode import Encoder
from ftune.data.show import show_examples
from ftune.data.sources import Rows, load_rows
from ftune.data.splits import Split
from ftune.data.tokenize import load_splits
from ftune.errors import DataError
from ftune.recipe.schema import DataSource, DataSpec

Tokenizer = PreTrainedTokenizerFast
Write = Callable[..., Path]

CHATS = [{"messages": chat("hello", "yes yes", "é", "日\n" * length, system="s")} for length in range(1, 30, 3)]


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own; returns where entries are."""
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / token_cache.KIND


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of records whenever some are encoded."""
    counts: list[int] = []
    original = Encoder.encode

    def counting(self: Encoder, records: Any) -> Any:
        counts.append(len(records))
        return original(self, records)

    monkeypatch.setattr(Encoder, "encode", counting)
    return counts


def same(one: Split, other: Split) -> bool:
    return (one.format, one.stats, one.fingerprint, one.rows) == (
        other.format,
        other.stats,
        other.fingerprint,
        other.rows,
    ) and all(
        (a.input_ids == b.input_ids).all()
        and (a.labels == b.labels).all()
        and a.row == b.row
        and a.input_ids.dtype == b.input_ids.dtype == a.labels.dtype == b.labels.dtype == np.int32
        for a, b in zip(one.examples, other.examples, strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_length": 80},
        {"max_length": 80, "too_long": "skip"},
        {"train_on": "all", "max_length": 8},
        {"eval_fraction": 0.3},
    ],
    ids=str,
)
def test_kept_tokens_are_those_of_the_first_time(
    settings: dict[str, Any], write: Write, tokenizer: Tokenizer, entries: Path, encoded: list[int]
) -> None:
    spec = DataSpec(train=DataSource(path=str(write(CHATS))), **settings)
    first = load_splits(spec, tokenizer, seed=0)
    splits = 1 + (first.eval is not None)
    assert sum(encoded) == len(CHATS)
    assert len(list(entries.iterdir())) == splits
    second = load_splits(spec, tokenizer, seed=0)
    assert sum(encoded) == len(CHATS)
    assert same(first.train, second.train)
    assert show_examples(first.train, tokenizer, color=False) == show_examples(second.train, tokenizer, color=False)
    if first.eval is not None:
        assert second.eval is not None
        assert same(first.eval, second.eval)
        assert not same(first.eval, second.train)


def test_ids_beyond_two_bytes_are_kept_whole(entries: Path) -> None:
    examples = tokenize.Examples(
        np.array([70_000, 3, 262_143], np.int32), np.array([False, True, True]), np.array([1, 2]), np.array([4, 9])
    )
    token_cache.store("key", token_cache.Entry(examples, {"rows": 2}, "abc"))
    entry = token_cache.load("key")
    assert entry is not None
    assert entry.examples.ids.tolist() == [70_000, 3, 262_143]
    assert entry.examples.trained.tolist() == [False, True, True]
    assert [(len(e), e.row) for e in entry.examples] == [(1, 4), (2, 9)]
    assert (entry.stats, entry.fingerprint) == ({"rows": 2}, "abc")


def key(rows: Rows, tokenizer: Tokenizer, **settings: Any) -> str:
    found = token_cache.key_of(rows, tokenizer, load_template(tokenizer), settings)
    assert found is not None
    return found


def test_whatever_decides_the_tokens_makes_another_key(
    write: Write, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_rows(DataSource(path=str(write(CHATS))))
    more = build_tokenizer()
    more.add_tokens("hello yes")
    special = build_tokenizer()
    special.backend_tokenizer.add_special_tokens([AddedToken("yes", special=True)])
    other_end = build_tokenizer()
    other_end.eos_token = "<|im_end|>"
    split = build_tokenizer()
    split.split_special_tokens = True
    keys = {
        "same": key(rows, tokenizer),
        "a byte": key(load_rows(DataSource(path=str(write([*CHATS[:-1], {"messages": chat("a", "b")}])))), tokenizer),
        "fewer rows": key(rows.select(range(5)), tokenizer),
        "other rows": key(rows.select(range(1, 6)), tokenizer),
        "kind of file": key(load_rows(DataSource(path=str(write(CHATS, "data.json")))), tokenizer),
        "template": key(rows, build_tokenizer("trims")),
        "no template": key(rows, build_tokenizer(None)),
        "first token": key(rows, build_tokenizer(adds_bos=True)),
        "vocabulary": key(rows, more),
        "special token": key(rows, special),
        "end": key(rows, other_end),
        "special tokens as text": key(rows, split),
        "setting": key(rows, tokenizer, max_length=9),
        "value": key(rows, tokenizer, max_length=10),
    }
    assert key(rows, build_tokenizer()) == keys["same"]
    assert key(load_rows(DataSource(path=str(write(CHATS, "elsewhere/copy.jsonl")))), tokenizer) == keys["same"]
    for package in token_cache.PACKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, "version_of", lambda name, newer=package: f"{name} {name == newer}")
            keys[package] = key(rows, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_code", lambda: "another")
        keys["code"] = key(rows, tokenizer)
    assert len(set(keys.values())) == len(keys)


def test_the_same_bytes_in_other_files_are_another_source(write: Write, tokenizer: Tokenizer) -> None:
    for name, first, second in [("x", "ab", "c"), ("y", "a", "bc")]:
        write(first, f"{name}/1.txt")
        write(second, f"{name}/2.txt")
    directory = write("elsewhere", "z/1.txt").parents[1]
    cut = [load_rows(DataSource(path=str(directory / name))) for name in "xy"]
    assert [[row["text"] for _, row in rows] for rows in cut] == [["ab", "c"], ["a", "bc"]]
    assert cut[0].fingerprint != cut[1].fingerprint
    assert key(cut[0], tokenizer) != key(cut[1], tokenizer)


def test_a_template_that_knows_the_day_is_rendered_anew_each_day(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    dated = build_tokenizer("{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    rows = load_rows(DataSource(path=str(write(CHATS))))

    def on(day: int, tokenizer: Tokenizer) -> str:
        class Today(date):
            @classmethod
            def today(cls) -> date:
                return date(2024, 1, day)

        monkeypatch.setattr(token_cache, "date", Today)
        return key(rows, tokenizer)

    assert on(1, dated) == on(1, dated) != on(2, dated)
    assert on(1, build_tokenizer()) == on(2, build_tokenizer())


def test_another_process_finds_the_entry(write: Write, tokenizer: Tokenizer) -> None:
    path = write(CHATS)
    code = (
        "import sys; from data.kit import build_tokenizer; from data.test_token_cache import key;"
        "from ftune.data.sources import load_rows; from ftune.recipe.schema import DataSource;"
        "print(key(load_rows(DataSource(path=sys.argv[1])), build_tokenizer(), a=1))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == key(load_rows(DataSource(path=str(path))), tokenizer, a=1)


def test_errors_are_not_kept(write: Write, tokenizer: Tokenizer, entries: Path, encoded: list[int]) -> None:
    spec = DataSpec(train=DataSource(path=str(write(CHATS))), max_length=40, too_long="error")
    for _ in range(2):
        with pytest.raises(DataError, match="longer than data.max_length = 40"):
            load_splits(spec, tokenizer, seed=0)
    assert encoded == [len(CHATS)] * 2
    assert not entries.exists() or list(entries.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "swapped"])
def test_a_damaged_entry_is_ignored_and_written_again(
    damage: str, write: Write, tokenizer: Tokenizer, entries: Path, encoded: list[int]
) -> None:
    spec = DataSpec(train=DataSource(path=str(write(CHATS))))
    first = load_splits(spec, tokenizer, seed=0).train
    (entry,) = entries.iterdir()
    whole = entry.read_bytes()
    stats = whole.replace(b'\\"rows\\": 10', b'\\"rows\\": 11')
    assert stats != whole
    entry.write_bytes(
        {"cut": whole[:-3], "flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "emptied": b"", "swapped": stats}[damage]
    )
    assert same(first, load_splits(spec, tokenizer, seed=0).train)
    assert len(encoded) == 2
    assert same(first, load_splits(spec, tokenizer, seed=0).train)
    assert len(encoded) == 2


def test_without_a_cache_tokens_are_made_each_time(
    write: Write, tokenizer: Tokenizer, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTUNE_CACHE_GIB", "0")
    spec = DataSpec(train=DataSource(path=str(write(CHATS))))
    assert same(load_splits(spec, tokenizer, seed=0).train, load_splits(spec, tokenizer, seed=0).train)
    assert len(encoded) == 2


def test_a_tokenizer_with_code_of_its_own_is_not_trusted_to_stay_the_same(
    write: Write, entries: Path, encoded: list[int]
) -> None:
    class Own(PreTrainedTokenizerFast):
        pass

    own = Own(tokenizer_object=build_tokenizer().backend_tokenizer, eos_token="<|eos|>")
    spec = DataSpec(train=DataSource(path=str(write([{"text": "hello"}]))))
    for _ in range(2):
        load_splits(spec, own, seed=0)
    assert len(encoded) == 2
    assert not entries.exists()


def test_where_a_row_stands_comes_from_the_file_of_today(
    write: Write, tokenizer: Tokenizer, entries: Path, encoded: list[int]
) -> None:
    first = load_splits(DataSpec(train=DataSource(path=str(write(CHATS)))), tokenizer, seed=0).train
    moved = load_splits(DataSpec(train=DataSource(path=str(write(CHATS, "moved.jsonl")))), tokenizer, seed=0).train
    assert len(encoded) == 1
    assert moved.rows.where(1).endswith("moved.jsonl:2")
    assert same(first, replace(moved, rows=first.rows))
