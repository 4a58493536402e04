"""Expressions of a stranger end in time."""

from __future__ import annotations

import time

import pytest

from ftune.errors import ModelError
from ftune.expressions import compiled, matching
from ftune.methods import Linear
from ftune.methods.targets import match_targets, target_problems

NAMES = [f"model.layers.{n}.self_attn.q_proj" for n in range(40)]


@pytest.mark.parametrize(
    "expression", ["(", "(" * 1000, "(?:" * 500 + "a" + ")" * 500, "a{1,9}{1,9}", "[", "x" * 20_000]
)
def test_what_is_none_is_refused_when_the_recipe_is_read(expression: str) -> None:
    with pytest.raises(ValueError, match="."):
        compiled(expression)
    (problem,) = target_problems(expression)
    assert problem.loc == ("method", "target_modules")


@pytest.mark.parametrize("expression", ["(.|.)*[!?]", "((.{1,1000}){1,1000}){1,1000}[!?]", r"(\w|.)+(\w|.)+[!?]"])
def test_what_takes_too_long_is_refused_in_seconds(expression: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ModelError, match="took longer than"):
        match_targets([Linear(name, 4, 4) for name in NAMES], expression)
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize(
    ("expression", "count"),
    [
        (r".*q_proj", 40),
        (r"model\.layers\.([0-9]|1[0-9])\..*", 20),
        (r".*\.(q|v)_proj", 40),
        ("q_proj", 0),
        (".*[02468]\\..*", 20),
    ],
)
def test_an_ordinary_one_matches_as_a_whole(expression: str, count: int) -> None:
    assert len(matching(expression, NAMES)) == count
