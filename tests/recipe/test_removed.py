"""What became of fields that recipes had in earlier versions."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from ftune.errors import RecipeError
from ftune.recipe import parse_recipe
from ftune.recipe.load import Loaded
from ftune.recipe.places import KeyPath
from ftune.recipe.removed import REMOVED, without_removed
from ftune.recipe.schema import Recipe

BASE = "model: org/tiny\nmethod: lora\ndata: a.jsonl\noutput_dir: runs/x\n"


def parsed(more: str, *overrides: str) -> Loaded:
    return parse_recipe(BASE + more, "r.yaml", overrides)


def test_a_recipe_of_before_loads_where_the_field_changed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFF", "false")
    plain = parsed("")
    for written in ("training: {compile: false}\n", "training:\n  compile: ${OFF}\n"):
        loaded = parsed(written)
        assert loaded.recipe == plain.recipe
        assert "compile" not in loaded.raw["training"]
    assert parsed("", "training.compile=false").recipe == plain.recipe
    assert parsed("training: {compile: true}\n", "training.compile=false").recipe == plain.recipe


@pytest.mark.parametrize("value", ["true", "auto", "'false'", "0", "null", "{}"])
def test_where_it_asked_for_something_it_is_told_what_to_do(value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parsed(f"training:\n  max_steps: 3\n  compile: {value}\n")
    assert caught.value.render() == (
        f"""error: `training.compile` was removed
  --> r.yaml:7:3
7 |   compile: {value}
  |   ^^^^^^^
  help: remove the line: compiled norms and gates gained 2 % of the time on a CPU, so ftune compiles no more"""
    )


def test_it_is_told_beside_other_mistakes_and_on_the_command_line() -> None:
    with pytest.raises(RecipeError) as caught:
        parsed("training: {compile: true, max_stepz: 3}\n")
    assert "max_stepz" in caught.value.render()
    assert "`training.compile` was removed" in caught.value.render()
    with pytest.raises(RecipeError, match=r"`training.compile` was removed"):
        parsed("", "training.compile=true")
    for broken in ("training: 3\n", "training: [compile]\n"):
        with pytest.raises(RecipeError):
            parsed(broken)


def test_the_record_of_a_run_of_before_is_read_and_left_as_it_is() -> None:
    stored = parsed("").recipe.model_dump(mode="json")
    old = {**stored, "training": {**stored["training"], "compile": True}}
    assert without_removed(old) == stored
    assert old["training"]["compile"] is True


@pytest.mark.parametrize("path", REMOVED)
def test_no_field_of_the_schema_is_called_removed(path: KeyPath) -> None:
    model: type[BaseModel] = Recipe
    for key in path[:-1]:
        model = type(getattr(parsed("").recipe, str(key)))
    assert path[-1] not in model.model_fields
