"""Encoding in several processes: the same parts in the same order, the same errors, nothing left behind."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from data.kit import build_tokenizer, chat
from ftune.data import workers
from ftune.data.encode import Encoder
from ftune.data.splits import Split
from ftune.data.tokenize import load_splits
from ftune.errors import DataError, FtuneError
from ftune.recipe.schema import DataSource, DataSpec

Tokenizer = PreTrainedTokenizerFast

CHATS = [{"messages": chat("hello", "yes " * (1 + i % 7), f"{i}", "no")} for i in range(40)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE_GIB", "0")
    monkeypatch.setattr(workers, "CHUNK", 3)
    monkeypatch.setattr(workers, "_processes", lambda: 2)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every process that is started, which now pays at once."""
    monkeypatch.setattr(workers, "WORTH_SECONDS", -1)
    found: list[subprocess.Popen[bytes]] = []
    original = workers._started

    def starting(encoder: bytes) -> subprocess.Popen[bytes]:
        found.append(original(encoder))
        return found[-1]

    monkeypatch.setattr(workers, "_started", starting)
    return found


@pytest.fixture
def load(write: Callable[..., Path]) -> Callable[..., Split]:
    def load(tokenizer: Tokenizer, rows: list[dict[str, Any]], **settings: Any) -> Split:
        return load_splits(DataSpec(train=DataSource(path=str(write(rows))), **settings), tokenizer, seed=0).train

    return load


def test_other_processes_give_the_same_in_the_same_order(
    load: Callable[..., Split],
    tokenizer: Tokenizer,
    started: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here: list[int] = []
    original = Encoder.encode

    def encode(self: Encoder, records: Any) -> Any:
        here.append(len(records))
        return original(self, records)

    monkeypatch.setattr(Encoder, "encode", encode)
    there = load(tokenizer, CHATS, max_length=54)
    # one chunk tells the speed, the others go elsewhere
    assert here == [3]
    assert 1 <= len(started) <= 2
    assert all(process.poll() is not None for process in started)
    monkeypatch.setattr(workers, "WORTH_SECONDS", 1e9)
    alone = load(tokenizer, CHATS, max_length=54)
    assert sum(here) == 3 + len(CHATS)
    assert there.stats == alone.stats
    assert 0 < there.stats.truncated < len(CHATS)
    assert there.fingerprint == alone.fingerprint
    assert [example.row for example in there.examples] == list(range(len(CHATS)))


def test_the_first_row_that_fails_is_named_whoever_found_it(
    load: Callable[..., Split], started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer("alternates")
    rows = [*CHATS[:20], *({"messages": [*chat("a", "b"), *chat("d", "e")[1:]]} for _ in range(9))]
    messages = []
    for worth in (-1.0, 1e9):
        monkeypatch.setattr(workers, "WORTH_SECONDS", worth)
        with pytest.raises(DataError) as caught:
            load(tokenizer, rows)
        messages.append(caught.value.render())
    assert messages[0] == messages[1]
    assert "data.jsonl:21: the chat template refuses" in messages[0]
    assert started
    assert all(process.poll() is not None for process in started)


def test_a_process_that_dies_is_an_error_with_a_reason(
    load: Callable[..., Split], tokenizer: Tokenizer, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "WORKER", "import sys; sys.exit(3)")
    with pytest.raises(FtuneError, match=r"ended early \(exit code 3\)"):
        load(tokenizer, CHATS)


def test_little_work_stays_here(
    load: Callable[..., Split], tokenizer: Tokenizer, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "WORTH_SECONDS", 1e9)
    load(tokenizer, CHATS)
    monkeypatch.setattr(workers, "WORTH_SECONDS", -1)
    monkeypatch.setattr(workers, "_processes", lambda: 1)
    load(tokenizer, CHATS)
    assert started == []


def test_ranks_of_one_machine_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert workers._processes() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers._processes() == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("RANK", raising=False)
    return now


def advance(progress: workers._Progress, clock: list[float], seconds: float) -> None:
    for _ in range(4):
        clock[0] += seconds
        progress.advance(500)
    progress.close()


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_short_work_says_nothing(stream: type[io.StringIO], clock: list[float]) -> None:
    out = stream()
    advance(workers._Progress(2000, out), clock, 0.4)
    assert out.getvalue() == ""


def test_long_work_draws_one_line_in_a_terminal_and_takes_it_away(clock: list[float]) -> None:
    out = Terminal()
    advance(workers._Progress(2000, out), clock, 1.5)
    assert "\n" not in out.getvalue()
    assert out.getvalue().split("\r\x1b[2K") == [
        "",
        "tokenizing: 1,000 of 2,000 rows (50%)",
        "tokenizing: 1,500 of 2,000 rows (75%)",
        "tokenizing: 2,000 of 2,000 rows (100%)",
        "",
    ]


def test_elsewhere_a_line_comes_now_and_then_and_from_one_rank(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    advance(workers._Progress(2000, out), clock, 6)
    assert out.getvalue() == "tokenizing: 1,000 of 2,000 rows (50%)\ntokenizing: 2,000 of 2,000 rows (100%)\n"
    monkeypatch.setenv("RANK", "1")
    silent = io.StringIO()
    advance(workers._Progress(2000, silent), clock, 6)
    assert silent.getvalue() == ""
