"""``--set method=NAME`` keeps what the other method takes, and names what it leaves out."""

from __future__ import annotations

import pytest

from ftune.errors import RecipeError
from ftune.methods import METHODS
from ftune.recipe import warnings
from ftune.recipe.load import Loaded, parse_recipe

TEXT = """model: m
method: {name: lora, rank: 8, alpha: 48, target_modules: [q_proj, v_proj], lora_plus_ratio: 16}
data: d.jsonl
output_dir: o
"""


def load(*overrides: str, text: str = TEXT) -> Loaded:
    return parse_recipe(text, "recipe.yaml", overrides)


@pytest.mark.parametrize("key", ["method", "method.name"])
def test_what_another_method_has_too_is_kept(key: str) -> None:
    loaded = load(f"{key}=dora")
    method = loaded.recipe.method.model_dump()
    assert (method["name"], method["rank"], method["alpha"]) == ("dora", 8, 48)
    assert method["target_modules"] == ("q_proj", "v_proj")
    (note,) = loaded.notes
    assert note == (
        "note: `method: dora` in place of `lora` keeps `rank`, `alpha`, `target_modules` and leaves out "
        "`lora_plus_ratio`, which `dora` does not take"
    )
    assert note in warnings(loaded)


def test_a_value_that_does_not_suit_is_left_out() -> None:
    text = TEXT.replace("lora_plus_ratio: 16", "quantization: {type: nf4}, init: pissa")
    loaded = load("method=bottleneck", text=text)
    assert "`quantization`" in loaded.notes[0].split("leaves out")[1]
    assert load("method=qlora", text=text).recipe.method.quantization is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_place_of_every_other(name: str) -> None:
    for before in METHODS:
        start = f"model: m\nmethod: {before}\ndata: d\noutput_dir: o\n"
        changed = load(f"method={name}", text=start)
        assert changed.recipe.method == load(text=start.replace(f"method: {before}", f"method: {name}")).recipe.method
        assert changed.notes == ()
    assert load(f"method={name}").recipe.method.name == name


def test_a_block_of_its_own_replaces_all() -> None:
    loaded = load("method={name: dora, rank: 2}")
    assert loaded.recipe.method.model_dump()["alpha"] is None
    assert loaded.notes == ()


def test_the_same_method_changes_nothing_and_settings_apply_in_order() -> None:
    assert load("method=lora").recipe == load().recipe
    assert load("method.rank=4", "method=dora", "method.alpha=3").recipe.method.model_dump()["rank"] == 4
    assert load("method=dora", "method.alpha=3").recipe.method.model_dump()["alpha"] == 3


def test_a_rate_of_another_method_is_doubted() -> None:
    text = TEXT + "optimizer: {learning_rate: 1.0e-3}\n"
    note = load("method=full", text=text).notes[-1]
    assert "`optimizer.learning_rate: 0.001` was given for `lora`, whose own is 0.0002; `full`'s own is 2e-05" in note
    assert len(load("method=dora", text=text).notes) == 1


def test_mistakes_have_their_place() -> None:
    with pytest.raises(RecipeError) as refused:
        load("method=dora", "method.rnak=4")
    assert "did you mean `rank`" in str(refused.value)
    with pytest.raises(RecipeError) as refused:
        load("method=dorra")
    assert "did you mean `dora`" in str(refused.value)
