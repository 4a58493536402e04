"""The annotated recipe and the JSON Schema say what the models say."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ftune.errors import FtuneError
from ftune.methods import METHODS
from ftune.recipe import annotated_recipe, json_schema, parse_recipe
from ftune.recipe.schema import Recipe
from ftune.recipe.suggestions import models_in

GIVEN = {"model": "org/tiny", "data": "data/train.jsonl", "output_dir": "runs/x"}


def short(method: str) -> Recipe:
    lines = [f"{key}: {value}" for key, value in (GIVEN | {"method": method}).items()]
    return parse_recipe("\n".join(lines), "short.yaml").recipe


@pytest.mark.parametrize("method", METHODS)
def test_it_parses_to_the_short_recipe(method: str) -> None:
    text = annotated_recipe(method, **GIVEN, schema="../recipe.schema.json")
    assert text.startswith("# yaml-language-server: $schema=../recipe.schema.json\n")
    assert parse_recipe(text, "annotated.yaml").recipe == short(method)


@pytest.mark.parametrize("method", METHODS)
def test_every_field_can_be_switched_on_and_has_its_default(method: str) -> None:
    """Removing the first `# ` of a field's line gives the same recipe, spelled out."""
    text = annotated_recipe(method, **GIVEN)
    field = r"^( *)# ((?:  )*(?:- )?[a-z_]+:(?: .*)?)$"
    live = re.sub(field, r"\1\2", text, flags=re.MULTILINE)
    recipe = parse_recipe(live, "live.yaml").recipe
    expected = short(method)
    assert recipe.model_dump(exclude={"data", "evaluation", "method"}) == expected.model_dump(
        exclude={"data", "evaluation", "method"}
    )
    assert recipe.data.eval is not None
    assert recipe.evaluation.metrics[0].name == "exact_match"
    for block in (Recipe, *METHODS[method].__mro__[:1]):
        for name in block.model_fields:
            assert re.search(rf"^ *(# )?{name}:", text, re.MULTILINE), name


def test_every_field_of_every_block_is_named_with_its_description() -> None:
    text = annotated_recipe("qlora", **GIVEN)
    words = " ".join(re.sub(r"[#\s]+", " ", line.split("#", 1)[-1]) for line in text.splitlines())

    def walk(model: Any) -> None:
        for name, info in model.model_fields.items():
            assert re.search(rf"(^|[ -]){name}:", text, re.MULTILINE), name
            if name == "method":
                walk(METHODS["qlora"])
            elif inner := next(models_in(info.annotation), None):
                walk(inner)
            else:
                assert (info.description or "missing").split()[0] in words

    walk(Recipe)


@pytest.mark.parametrize("value", ["a: b", "#x", "1", "null", "a, b", "[x]", 'say "x"', "yes", "C:\\x", "余 弦"])
def test_given_values_are_quoted_where_they_must_be(value: str) -> None:
    text = annotated_recipe("lora", model=value, data=value, output_dir=value)
    recipe = parse_recipe(text, "r.yaml").recipe
    assert (recipe.model.id, recipe.data.train.path, recipe.output_dir) == (value, value, value)


def test_an_unknown_method_is_a_users_mistake() -> None:
    with pytest.raises(FtuneError, match="no method `lorra`") as near:
        annotated_recipe("lorra", **GIVEN)
    assert near.value.help == "did you mean `lora`?"
    with pytest.raises(FtuneError, match="no method `xyz`") as far:
        annotated_recipe("xyz", **GIVEN)
    assert far.value.help == f"methods: {', '.join(METHODS)}"


def test_lines_fit_a_screen() -> None:
    for method in METHODS:
        assert max(map(len, annotated_recipe(method, **GIVEN).splitlines())) <= 100


def test_json_schema() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"$id", "title", "description"} <= schema.keys()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "method", "data", "output_dir"}

    def kinds(node: dict[str, Any]) -> set[str]:
        options = node.get("anyOf", [node])
        return {option.get("type", "reference") for option in options}

    properties = schema["properties"]
    for name in ("model", "method", "data"):
        assert "string" in kinds(properties[name]), name
    assert "null" in kinds(properties["training"])
    definitions = schema["$defs"]
    assert "string" in kinds(definitions["DataSpec"]["properties"]["train"])
    assert {"string", "null"} <= kinds(definitions["DataSpec"]["properties"]["eval"])
    assert "string" in kinds(definitions["EvaluationSpec"]["properties"]["metrics"]["items"])
    for definition in definitions.values():
        assert definition.get("additionalProperties") is False, definition["title"]


@pytest.mark.parametrize("method", METHODS)
def test_rows_can_be_held_out_by_a_live_line(method: str) -> None:
    text = annotated_recipe(method, **GIVEN, eval_fraction=0.1)
    recipe = parse_recipe(text, "annotated.yaml").recipe
    data = short(method).data.model_copy(update={"eval_fraction": 0.1})
    assert recipe == short(method).model_copy(update={"data": data})


@pytest.mark.parametrize(("method", "rate"), [("lora", "0.0002"), ("full", "2e-5"), ("prefix", "0.01")])
def test_the_rate_is_the_method_s_own(method: str, rate: str) -> None:
    words = " ".join(re.sub(r"[#\s]+", " ", annotated_recipe(method, **GIVEN)).split())
    assert f"Default: {method}'s own, {rate}, higher for under 1000 updates." in words
