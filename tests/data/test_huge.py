"""Rows too large to tokenize at once: left out by their length where that is sure, else tokenized in pieces."""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from data.kit import SPECIALS, build_tokenizer, chat
from ftune.data import encode, huge, pieces, workers
from ftune.data.borders import Borders
from ftune.data.huge import bound_of
from ftune.data.splits import Split
from ftune.data.tokenize import load_splits
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


@pytest.mark.parametrize("too_long", ["truncate", "skip", "error"])
def test_no_more_is_tokenized_than_tells_what_becomes_of_a_row(
    load: Callable[..., Split], tokenized: list[str], monkeypatch: pytest.MonkeyPatch, too_long: str
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 500)
    # each token could be twelve bytes long, so that the bound alone does not tell
    rows = [{"prompt": "q", "completion": "yes"}, {"prompt": "q", "completion": "hello " * 5000}]
    if too_long == "error":
        with pytest.raises(DataError, match="1 of 2 rows is longer than data.max_length = 4000"):
            load(rows, max_length=4000, too_long=too_long)
    else:
        split = load(rows, max_length=4000, too_long=too_long)
        assert (split.stats.truncated, split.stats.skipped) == ((1, 0) if too_long == "truncate" else (0, 1))
        assert list(split.stats.notes.values()) == [1]
    assert max(map(len, tokenized)) < 600
    assert sum(map(len, tokenized)) < 29_000


def _arrays(split: Split) -> list[list[int]]:
    found = split.examples
    return [array.tolist() for array in (found.ids, found.trained, found.lengths, found.rows)]


def test_what_is_cut_off_unseen_is_counted_as_the_least_it_can_be(
    load: Callable[..., Split], tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 500)
    rows = [{"prompt": "q", "completion": "hello " * 1000}]
    split = load(rows, max_length=64, too_long="truncate")
    monkeypatch.setattr(encode, "HUGE", 10**9)
    whole = load(rows, max_length=64, too_long="truncate")
    assert _arrays(split) == _arrays(whole)
    assert split.stats.cut_answers == whole.stats.cut_answers == 1
    assert 5500 / 12 <= split.stats.lost_tokens < whole.stats.lost_tokens
    assert 5500 / 12 <= split.stats.lost_target_tokens < whole.stats.lost_target_tokens


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


WORDS = ["hello", " yes", " 日本", ", ", "\n", "\n\n", "12", "e\u0301", " <|im_start|>", ADDED, "  "]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.lists(st.sampled_from(WORDS)), st.integers(0, 40))
def test_pieces_have_the_tokens_of_the_whole(name: str, words: list[str], prompt: int) -> None:
    # two words behind each, so that there is a place to cut at
    text = "".join(f"{word} go on" for word in words)
    borders = Borders(TOKENIZERS[name], frozenset())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 60)
        for prompt_end in (None, min(prompt, len(text))):
            ids, offsets = borders.split(text, prompt_end or 0)
            found = list(pieces.pieces(text, borders, prompt_end))
            assert "".join(text[piece.start : piece.end] for piece in found) == text
            assert [i for piece in found for i in piece.ids.tolist()] == ids
            # behind a byte that the vocabulary lacks, the library's offsets in one text are shifted
            if name != "lacking":
                assert [tuple(pair) for piece in found for pair in piece.offsets.tolist()] == offsets


def test_a_text_without_any_border_is_cut_all_the_same(
    load: Callable[..., Split], tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 500)
    assert load([{"text": "a" * 3000}], max_length=4000, too_long="split").stats.tokens >= 3000
    assert max(map(len, tokenized)) < 600


@pytest.mark.parametrize("row", [{"text": "hello yes, " * 300}, {"text": "<|bos|>" + "12\nhello " * 300}])
def test_a_huge_text_is_split_into_the_windows_of_the_whole(
    load: Callable[..., Split], tokenized: list[str], monkeypatch: pytest.MonkeyPatch, row: dict[str, str]
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 500)
    found = load([row], max_length=64, too_long="split")
    assert max(map(len, tokenized)) < 600
    monkeypatch.setattr(encode, "HUGE", 10**9)
    whole = load([row], max_length=64, too_long="split")
    assert (found.stats, _arrays(found)) == (whole.stats, _arrays(whole))


def test_a_huge_answer_in_a_chat_is_trained_as_the_whole(
    load: Callable[..., Split], tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 500)
    rows = [{"messages": [*chat("hi " * 400, "yes " * 300), *chat("and, " * 300, "well. " * 200)]}]
    found = load(rows, max_length=10_000)
    assert max(map(len, tokenized)) < 600
    monkeypatch.setattr(encode, "HUGE", 10**9)
    assert _arrays(found) == _arrays(load(rows, max_length=10_000))


def test_an_added_token_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 60)
    text = "hello" * 9 + ADDED * 5
    found = list(pieces.pieces(text, Borders(TOKENIZERS["added"], frozenset()), None))
    added = TOKENIZERS["added"].convert_tokens_to_ids(ADDED)
    assert [i for piece in found for i in piece.ids.tolist()].count(added) == 5
