"""Recipes written in Python are read as those in files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ftune.errors import RecipeError
from ftune.methods import METHODS
from ftune.recipe.load import parse_recipe
from ftune.recipe.schema import ModelSpec
from ftune.recipe.written import options_of, parse_fields, recipe_text

FIELDS: dict[str, Any] = {
    "model": "org/tiny",
    "method": {"name": "lora", "rank": 8},
    "data": {"train": {"path": "a b: c.jsonl"}, "chat_template": None},
    "evaluation": {"metrics": ["f1", {"name": "regex", "pattern": "x\n\u2028(\\d+)#"}]},
    "optimizer": {"learning_rate": 1e-5},
    "training": {"max_steps": 3, "max_grad_norm": None, "epochs": 0.5},
    "output_dir": "runs/x",
}


def test_the_text_is_the_same_recipe() -> None:
    loaded = parse_fields(FIELDS)
    assert loaded.recipe == parse_recipe(loaded.text, "recipe.yaml").recipe
    assert loaded.recipe.evaluation.metrics[1].pattern == "x\n\u2028(\\d+)#"
    assert loaded.recipe.data.train.path == "a b: c.jsonl"
    assert loaded.recipe.optimizer.learning_rate == 1e-5


@given(st.text(min_size=1))
def test_any_string_is_read_back(text: str) -> None:
    if "${" in text or "\0" in text:
        return
    assert parse_fields(FIELDS | {"output_dir": text}).recipe.output_dir == text


def test_objects_of_the_schema_paths_and_numbers_of_numpy() -> None:
    fields = FIELDS | {
        "model": ModelSpec(id="org/tiny", dtype="float32"),
        "method": METHODS["lora"](rank=4),
        "data": Path("train.jsonl"),
        "training": {"max_steps": np.int64(3), "epochs": np.float32(0.5)},
    }
    recipe = parse_fields(fields).recipe
    assert (recipe.model.dtype, recipe.method.name, recipe.data.train.path) == ("float32", "lora", "train.jsonl")
    assert (recipe.training.max_steps, recipe.training.epochs) == (3, 0.5)


def test_a_mistake_is_named_by_its_path() -> None:
    wrong = FIELDS | {"method": {"name": "lora", "rnak": 16}, "training": {"max_steps": "20"}}
    with pytest.raises(RecipeError) as caught:
        parse_fields(wrong)
    assert caught.value.reports == [
        "error: unknown field `rnak` for method `lora`\n  --> method.rnak\n  |   rnak: 16\n  |   ^^^^ did you mean "
        "`rank`?",
        'error: `training.max_steps` must be a whole number, not the string "20"\n  --> training.max_steps\n'
        '  |   max_steps: "20"\n  |              ^^^^ remove the quotes',
    ]


def test_what_is_missing_is_said_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match="the recipe has no `output_dir`\n  --> the recipe"):
        parse_fields({name: value for name, value in FIELDS.items() if name != "output_dir"})


def test_a_value_that_no_recipe_can_hold() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_fields(FIELDS | {"training": {"max_steps": {1, 2}, 3: 4}})
    first, second = caught.value.reports
    assert first.startswith("error: `training.max_steps` is a set, which no recipe can hold\n  --> training.max_steps")
    assert second.startswith("error: the key 3 is a int: keys are strings\n  --> training.3")


def test_a_mapping_that_holds_itself() -> None:
    loop: dict[str, Any] = {}
    loop["x"] = loop
    with pytest.raises(RecipeError, match="nested deeper"):
        parse_fields(FIELDS | {"training": loop})


def test_overrides_are_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", "here${x")
    changed = {"training.max_steps": 20, "data": {"train": "x, y"}, "evaluation.metrics": ["f1"], "method.rank": 2}
    fields = FIELDS | {"output_dir": "${RUNS}"}
    loaded = parse_fields(fields, changed)
    assert loaded.recipe == parse_recipe(loaded.text, "r", options_of(changed)).recipe
    assert (loaded.recipe.training.max_steps, loaded.recipe.data.train.path) == (20, "x, y")
    again = parse_recipe(recipe_text(loaded), "r")
    assert again.recipe == loaded.recipe
    assert again.recipe.output_dir == "here${x"
    assert yaml.safe_load(recipe_text(loaded))["training"]["max_steps"] == 20


def test_a_mistake_in_an_override() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_fields(FIELDS, {"training.max_step": 20})
    assert "--> overrides\n  | training.max_step=20\n" in caught.value.reports[0]
    assert "--set" not in caught.value.render()


def test_an_override_cannot_trust_code() -> None:
    with pytest.raises(RecipeError, match="cannot be set by an override"):
        parse_fields(FIELDS, {"model.trust_remote_code": True})


def test_a_variable_may_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "12")
    loaded = parse_fields(FIELDS | {"training": {"max_steps": "${STEPS}"}})
    assert loaded.recipe.training.max_steps == 12
    assert "${STEPS}" in loaded.text
