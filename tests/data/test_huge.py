"""Rows too large to tokenize: left out by their length where that is sure, refused where memory does not suffice."""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from data.kit import SPECIALS, build_tokenizer, chat
from ftune.data import encode, huge, workers
from ftune.data.borders import Borders
from ftune.data.huge import bound_of
from ftune.data.tokenize import Split, load_splits
from ftune.errors import DataError
from ftune.recipe.schema import DataSource, DataSpec

ROWS = [
    {"prompt": "q", "completion": "yes"},
    {"prompt": "q", "completion": "a" * 3000},
    {"prompt": "q" * 3000, "completion": "yes"},
]


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that reaches the tokenizer; 1,000 characters are huge."""
    seen: list[str] = []
    original = Borders.tokenized

    def spying(self: Borders, texts: Any, **wanted: bool) -> Any:
        seen.extend(texts)
        return original(self, texts, **wanted)

    monkeypatch.setattr(Borders, "tokenized", spying)
    monkeypatch.setattr(encode, "HUGE", 1000)
    monkeypatch.setenv("FTUNE_CACHE_GIB", "0")
    return seen


@pytest.fixture
def load(write: Callable[..., Path]) -> Callable[..., Split]:
    def load(rows: list[dict[str, Any]], **settings: Any) -> Split:
        spec = DataSpec(train=DataSource(path=str(write(rows))), **settings)
        return load_splits(spec, build_tokenizer(), seed=0).train

    return load


def test_skipped_rows_are_counted_without_being_tokenized(load: Callable[..., Split], tokenized: list[str]) -> None:
    split = load(ROWS, max_length=64, too_long="skip")
    assert (split.stats.examples, split.stats.skipped) == (1, 2)
    assert max(map(len, tokenized)) < 1000
    chats = [{"messages": chat("q", "yes")}, {"messages": chat("q" * 3000, "yes")}]
    split = load(chats, max_length=64, too_long="skip")
    assert (split.stats.examples, split.stats.skipped) == (1, 1)
    assert max(map(len, tokenized)) < 1000


def test_error_names_them_without_tokenizing(load: Callable[..., Split], tokenized: list[str]) -> None:
    with pytest.raises(DataError, match="2 of 3 rows are longer than data.max_length = 64") as caught:
        load(ROWS, max_length=64, too_long="error")
    # the longest token is <|im_start|>, 12 bytes: at least 3000 / 12, and one of the prompt
    assert "data.jsonl:2: 251 tokens" in caught.value.message
    assert max(map(len, tokenized)) < 1000


def test_what_may_fit_is_tokenized(load: Callable[..., Split], tokenized: list[str]) -> None:
    split = load(ROWS, max_length=400, too_long="skip")
    assert (split.stats.examples, split.stats.skipped) == (1, 2)
    # behind the end of its prompt
    assert max(map(len, tokenized)) == 3001
    assert load(ROWS, max_length=64, too_long="truncate").stats.truncated == 1


@pytest.mark.parametrize("too_long", ["truncate", "skip"])
def test_a_row_that_memory_does_not_suffice_for_is_named(
    load: Callable[..., Split], tokenized: list[str], monkeypatch: pytest.MonkeyPatch, too_long: str
) -> None:
    monkeypatch.setattr(huge, "available_bytes", lambda device: 0)
    with pytest.raises(
        DataError, match=r"data\.jsonl:2: one row of .* of text: tokenizing it takes at least"
    ) as caught:
        load(ROWS, max_length=400, too_long=too_long)
    assert caught.value.help is not None
    assert not tokenized


def test_what_a_text_takes_is_held_against_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.Process().memory_info().rss + 10**9
    monkeypatch.setattr(huge, "available_bytes", lambda device: free)
    huge.require_memory(10**7)  # 0.9 GB
    with pytest.raises(DataError, match="tokenizing it takes at least"):
        huge.require_memory(12 * 10**6)


def _tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    definition = json.loads(build_tokenizer().backend_tokenizer.to_str())
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            definition[part][field] = value
        else:
            definition[part] = value if isinstance(value, list) else json.loads(value.__getstate__())
    raw = Tokenizer.from_str(json.dumps(definition))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|eos|>")


def _without(*bytes_: int) -> dict[str, int]:
    vocabulary: dict[str, int] = json.loads(build_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    lacking = {huge._as_character(byte) for byte in bytes_}
    return {token: number for token, number in vocabulary.items() if token not in lacking}


def test_bytes_are_written_as_the_library_does() -> None:
    assert sorted(map(huge._as_character, range(256))) == sorted(ByteLevel.alphabet())
    splitter = ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in range(128):
        assert splitter.pre_tokenize_str(chr(byte))[0][0] == huge._as_character(byte)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Replace(" ", "")},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},  # unknown characters are dropped
        {"pre_tokenizer": pre_tokenizers.Metaspace(), "model__byte_fallback": True},  # to bytes that are not there
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), ByteLevel()])},
        {"added_tokens": [{"id": 0, "content": "<|pad|>", "single_word": False, "lstrip": True, "rstrip": False,
                           "normalized": False, "special": True}]},
    ],
)  # fmt: skip
def test_there_is_no_bound_where_text_can_vanish(changes: dict[str, Any]) -> None:
    assert bound_of(_tokenizer(**changes)) is None


def _falling_back(character: str, *steps: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    """Llama 2's kind: characters, and bytes for what is no such character; its longest token is eight times one."""
    merges = [(character * times, character * times) for times in (1, 2, 4)]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "a", "▁", character, *map("".join, merges)]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True))
    raw.normalizer = normalizers.Sequence(list(steps))
    raw.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|eos|>")


def _with_more(token: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a token that its vocabulary does not have."""
    raw = Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str())
    raw.add_special_tokens([token])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|eos|>")


NFC = _tokenizer(normalizer=normalizers.NFC())
LACKING = _tokenizer(model__vocab=_without(ord("a"), 0xE6))
ADDED = "<|a token that was added later on|>"
DECOMPOSED = unicodedata.normalize("NFD", "\uac01")  # one syllable of three bytes, in nine
TOKENIZERS = {
    "plain": build_tokenizer(),
    "nfc": NFC,
    "lacking": LACKING,
    "added": _with_more(ADDED),
    "falling back": _falling_back("日", normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")),
    "falling back, nfc": _falling_back("\uac01", normalizers.NFC()),
}
PARTS = ["a", "日" * 8, "hello", " yes", "\n\n", DECOMPOSED * 8, "<|im_start|>", "e\u0301", "\x00", ADDED]
BOUNDS = {name: bound_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.lists(st.sampled_from(PARTS)))
def test_no_text_has_fewer_tokens_than_the_bound(name: str, parts: list[str]) -> None:
    text, bound = "".join(parts), BOUNDS[name]
    assert bound is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bound.least(text) <= len(TOKENIZERS[name](text, add_special_tokens=False)["input_ids"])


def test_a_chunk_holds_so_many_rows_and_so_much_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK", 3)
    monkeypatch.setattr(workers, "CHUNK_CHARACTERS", 10)
    sizes = [1, 1, 1, 1, 9, 1, 30, 2, 2]
    plain = [encode.Plain("a" * (size // 2), "a" * (size - size // 2), row) for row, size in enumerate(sizes)]
    halves = [chat("a" * (size // 2), "a" * (size - size // 2)) for size in sizes]
    chats = [encode.Conversation(tuple(messages), row) for row, messages in enumerate(halves)]
    for records in (plain, chats):
        chunks = [[sizes[record.row] for record in chunk] for chunk in workers._chunks(records)]
        assert chunks == [[1, 1, 1], [1, 9], [1], [30], [2, 2]]
        encoded: list[int] = []
        encoder: Any = SimpleNamespace(encode=lambda chunk, encoded=encoded: encoded.append(len(chunk)))
        list(workers.encode_all(encoder, records))
        assert encoded == [3, 2, 1, 1, 2]
    assert list(workers._chunks([])) == []
