"""Rows that are held out and trained on as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.kit import build_tokenizer, chat
from ftune.data.overlap import Overlap, told
from ftune.data.tokenize import load_splits
from ftune.recipe.schema import DataSource, DataSpec

Write = Callable[..., Path]


def found(write: Write, train: list[Any], held_out: list[Any], *, adds_bos: bool = False, **settings: Any) -> Overlap:
    sources = {"train": write(train, "train.jsonl"), "eval": write(held_out, "eval.jsonl")}
    spec = DataSpec(**{key: DataSource(path=str(path)) for key, path in sources.items()}, **settings)
    return load_splits(spec, build_tokenizer(adds_bos=adds_bos), seed=0).overlap


def answer(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def test_rows_and_prompts_that_are_trained_on_are_counted(write: Write) -> None:
    train = [answer("a", "x"), answer("b", "x"), answer("c", "x"), answer("c", "x")]
    held_out = [answer("a", "x"), answer("a", "y"), answer("d", "x"), answer("ax", "")]
    held_out[-1] = answer("c ", "x")  # another prompt, however like it looks
    assert found(write, train, held_out) == Overlap(held_out=4, whole=1, prompts=1, train=4, repeated=1)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_texts_have_no_prompts(write: Write, adds_bos: bool) -> None:
    result = found(write, [{"text": "a"}, {"text": "b"}], [{"text": "b"}, {"text": "c"}], adds_bos=adds_bos)
    assert (result.whole, result.prompts) == (1, 0)


def test_a_prompt_is_all_before_the_last_answer(write: Write) -> None:
    train = [{"messages": chat("hi", "hello", "more", "yes")}]
    held_out = [{"messages": chat("hi", "hello", "else", "no")}, {"messages": chat("hi", "hello", "more", "no")}]
    assert found(write, train, held_out).prompts == 1
    assert found(write, train, held_out, train_on="all").prompts == 0


def test_what_is_told() -> None:
    assert told(Overlap(40, 0, 0, 200, 0)) == []
    both, repeated = told(Overlap(40, 10, 2, 2000, 1500))
    assert both.startswith("12 of 40 held-out examples are trained on as well (10 to the last token, 2 with the same")
    assert repeated == "1,500 of 2,000 training examples are the same as one before them"
    assert "0 " not in told(Overlap(40, 0, 2, 200, 0))[0].partition("(")[2].partition(")")[0]
