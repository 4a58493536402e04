"""What a recipe leaves out of its training fits the size of its data, and is written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from run.test_loop import train_until

from ftune.artifacts.training import train
from ftune.methods import METHODS
from ftune.plan.defaults import choose_length, choose_rate, few_updates
from ftune.plan.plan import Plan
from ftune.plan.resolve import resolve
from ftune.plan.summary import summary_of
from ftune.recipe.load import Loaded
from ftune.recipe.schema import Recipe, TrainingSpec


def left_open(where: Path, method: str = "lora", /, **blocks: Any) -> Loaded:
    """The tiny recipe without length, rows of an update and rate."""
    blocks["training"] = {"max_steps": None, "gradient_accumulation_steps": None, **blocks.get("training", {})}
    blocks["optimizer"] = {"learning_rate": None, **blocks.get("optimizer", {})}
    return tiny.recipe(where, method, **blocks)


def chosen(plan: Plan) -> dict[str, float]:
    return {choice.field.rpartition(".")[2]: choice.value for choice in plan.choices}


@pytest.mark.parametrize(
    ("rows", "in_an_update", "epochs", "updates"),
    [
        (1, 1, 10, 10),
        (13, 1, 8, 104),
        (99, 1, 2, 198),
        (150, 1, 1, 150),
        (215, 2, 1, 108),
        (800, 8, 1, 100),
        (3_200, 32, 1, 100),
        (100_000, 32, 1, 3_125),
    ],
)
def test_small_data_gets_a_hundred_updates(rows: int, in_an_update: int, epochs: int, updates: int) -> None:
    found = choose_length(TrainingSpec(), rows, 1)
    assert (found.training.accumulation, found.training.epochs, found.total_steps) == (in_an_update, epochs, updates)
    assert [choice.field for choice in found.choices] == ["training.gradient_accumulation_steps", "training.epochs"]


@pytest.mark.parametrize(
    ("rows", "fill", "in_an_update", "updates"),
    [
        (198, 0.06, 8, 100),  # 17 of them would fill a row
        (198, 0.3, 2, 198),
        (198, 0.9, 1, 198),
        (40, 0.06, 4, 100),
        (5, 0.06, 1, 50),
        (3_200, 0.06, 32, 100),
    ],
)
def test_short_rows_share_an_update(rows: int, fill: float, in_an_update: int, updates: int) -> None:
    found = choose_length(TrainingSpec(), rows, 1, fill=fill)
    assert (found.training.accumulation, found.total_steps) == (in_an_update, updates)


def test_processes_and_micro_batches_share_an_update_of_that_size() -> None:
    whole = choose_length(TrainingSpec(), 3_200, 1)
    parts = choose_length(TrainingSpec(micro_batch_size=4), 3_200, 2)
    assert parts.training.accumulation == 4
    assert parts.total_steps == whole.total_steps == 100
    assert choose_length(TrainingSpec(), 3_200, 1, one_pass=True).training.accumulation == 1


@pytest.mark.parametrize(
    ("given", "updates"),
    [
        ({"epochs": 1.0}, 13),
        ({"gradient_accumulation_steps": 8}, 20),
        ({"epochs": 1.0, "gradient_accumulation_steps": 8}, 2),
        ({"max_steps": 5}, 5),
        ({"max_steps": 500, "epochs": 3.0}, 39),
    ],
)
def test_what_is_given_is_kept(given: dict[str, Any], updates: int) -> None:
    found = choose_length(TrainingSpec(**given), 13, 1)
    assert found.total_steps == updates
    assert {name: getattr(found.training, name) for name in given} == given
    assert not {f"training.{name}" for name in given} & {choice.field for choice in found.choices}
    if "max_steps" in given and "epochs" not in given:
        assert found.training.epochs is None, "as many as max_steps needs"


@pytest.mark.parametrize("name", METHODS)
def test_few_updates_get_a_higher_rate_as_far_as_the_method_bears(name: str) -> None:
    method = tiny.method(name)
    recipe = Recipe(model="m", method=method, data="d", output_dir="o")
    own = method.default_learning_rate
    assert choose_rate(recipe, 1_000)[0] == own == choose_rate(recipe, 10**6)[0]
    # a power of 1000 / updates, so that a factor of 5 at 40 updates is its square root
    assert choose_rate(recipe, 200)[0] == pytest.approx(own * method.few_updates_factor**0.5, rel=0.06)
    for few in (40, 1):
        assert choose_rate(recipe, few)[0] == pytest.approx(own * method.few_updates_factor, rel=0.06)
    asked = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"learning_rate": 1e-7})})
    assert choose_rate(asked, 1) == (1e-7, ())


def test_a_plan_says_what_was_chosen_and_the_written_recipe_makes_the_same_run(tmp_path: Path) -> None:
    plan = resolve(left_open(tmp_path).recipe)
    assert chosen(plan) == {"gradient_accumulation_steps": 1, "epochs": 10, "learning_rate": 8.2e-4}
    assert len(plan.rows) == 6
    assert plan.total_steps == 60
    assert summary_of(plan)["training"]["chosen"][2]["why"] == "lora's own 0.0002 x 4.1 for 60 updates"
    again = resolve(plan.recipe)
    assert again.choices == ()
    assert again.recipe == plan.recipe
    assert again.total_steps == 60


def test_galore_that_updates_in_the_backward_pass_accumulates_nothing(tmp_path: Path) -> None:
    loaded = left_open(tmp_path, "galore", method={"per_layer": True}, training={"max_grad_norm": None})
    assert loaded.recipe.method.problems(loaded.recipe)
    assert not list(loaded.recipe.method.problems(loaded.recipe))
    assert resolve(loaded.recipe).recipe.training.accumulation == 1


def test_a_resumed_run_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    loaded = left_open(tmp_path, training={"epochs": 2.0})
    whole = train(left_open(tmp_path, training={"epochs": 2.0}, output_dir=str(tmp_path / "whole")))
    train_until(loaded, 3)
    begun = json.loads((tmp_path / "run/run.json").read_text())
    assert begun["resolved"]["training"]["gradient_accumulation_steps"] == 1
    # Another version would have chosen otherwise.
    begun["resolved"]["optimizer"]["learning_rate"] = 1.5e-3
    chosen_then = begun["plan"]["training"]["chosen"]
    (tmp_path / "run/run.json").write_text(json.dumps(begun))
    record = train(loaded, resume=True)
    assert record["resolved"]["optimizer"]["learning_rate"] == 1.5e-3
    assert record["plan"]["training"]["chosen"] == chosen_then != []
    assert record["measured"]["steps"] == whole["measured"]["steps"] == 12


def test_an_older_run_without_epochs_goes_on_as_one_epoch(tmp_path: Path) -> None:
    asked = {"gradient_accumulation_steps": 2}
    train_until(left_open(tmp_path, training={"epochs": 1.0, **asked}), 1)
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["resolved"]["training"]["epochs"] = None
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    done = train(left_open(tmp_path, training=asked), resume=True)
    assert done["measured"]["steps"] == 3
    assert done["resolved"]["training"]["epochs"] == 1.0


def test_few_updates_are_told_with_what_to_change(tmp_path: Path) -> None:
    def told(training: dict[str, Any], **blocks: Any) -> str | None:
        plan = resolve(left_open(tmp_path, training=training, **blocks).recipe)
        packed = len(plan.rows) < len(plan.splits.train.examples)
        return few_updates(plan.recipe, plan.total_steps, plan.steps_per_epoch, packed=packed)

    assert told({}) is None
    few = told({"epochs": 1.0, "gradient_accumulation_steps": 6}, optimizer={"learning_rate": 2e-4})
    assert few is not None
    assert few.startswith("only 1 update, in which little is learned")
    assert "`training.gradient_accumulation_steps: 1` makes 6 times as many" in few
    assert "`training.epochs: 10` makes 10" in few
    assert "try 0.001" in few
    capped = told({"max_steps": 4})
    assert capped is not None
    assert "`training.max_steps: 100`, or leave it out" in capped
    assert "learning rate" not in capped, "which was chosen for so few"


def test_rows_that_are_too_few_are_said_to_be() -> None:
    recipe = Recipe(model="m", method=tiny.method("lora"), data="d", output_dir="o")
    training = choose_length(recipe.training, 1, 1).training
    optimizer = recipe.optimizer.model_copy(update={"learning_rate": choose_rate(recipe, 10)[0]})
    settled = recipe.model_copy(update={"training": training, "optimizer": optimizer})
    assert few_updates(settled, 10, 1, packed=False) == (
        "only 10 updates, in which little is learned: more rows are needed than there are"
    )
    told = few_updates(settled, 10, 1, packed=True)
    assert told is not None
    assert "`data.packing: false` makes more of them" in told
