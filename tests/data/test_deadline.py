"""Templates of a stranger end in time, in every thread."""

from __future__ import annotations

import threading
import time

import pytest

from data.kit import TEMPLATES, build_tokenizer
from ftune.data import chat
from ftune.data.chat import load_template
from ftune.data.deadline import TooLongError, within
from ftune.errors import DataError

FOR_A, FOR_B, END = "{% for a in range(99999) %}", "{% for b in range(99999) %}", "{% endfor %}"


def endless() -> None:
    while True:
        pass


def test_a_block_that_takes_too_long_ends() -> None:
    began = time.monotonic()
    with pytest.raises(TooLongError), within(0.2):
        endless()
    assert time.monotonic() - began < 20
    with within(30):  # and the next one has its own time
        pass


def test_in_another_thread_it_ends_too() -> None:
    ended = []

    def run() -> None:
        try:
            with within(0.2):
                endless()
        except TooLongError:
            ended.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with within(60):
        thread.join(30)
    assert ended == [True]


def test_an_exception_of_the_block_is_its_own() -> None:
    with pytest.raises(KeyError), within(30):
        raise KeyError


@pytest.mark.parametrize(
    "body",
    [
        FOR_A + FOR_B + "{% for c in range(99999) %}{% endfor %}" + END * 2,
        "{% set ns = namespace(n=0) %}" + FOR_A + FOR_B + "{% set ns.n = ns.n + 1 %}" + END * 2,
        "{% macro m(n) %}" + FOR_A + "{% if n %}{{ m(n - 1) }}{% endif %}" + END + "{% endmacro %}{{ m(9) }}",
    ],
)
def test_loops_of_a_template_are_refused_in_seconds(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
    began = time.monotonic()
    for name in ("chatml", "marks"):
        with pytest.raises(DataError, match=r"needs more than 0\.3 seconds for one conversation"):
            load_template(build_tokenizer(TEMPLATES[name] + body))
    assert time.monotonic() - began < 30
