"""A run resumed on another number of processes has the same global batches, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from run.test_loop import stop_after
from torch import nn

from ftune.artifacts.training import train
from ftune.artifacts.world import in_world, note_of
from ftune.errors import Interrupted, RunDirError
from ftune.recipe.load import parse_recipe
from ftune.recipe.schema import Recipe


def recipe(micro: int, accumulation: int) -> Recipe:
    training = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
    text = {"model": "m", "method": "lora", "data": "d", "training": training, "output_dir": "o"}
    return parse_recipe(json.dumps(text), "recipe.yaml").recipe


@pytest.mark.parametrize(
    ("began", "now", "world", "expected"),
    [
        (4, 4, 1, 4),
        (4, 4, 2, 2),
        (4, 4, 4, 1),
        (4, 2, 2, 2),  # the user has halved it already
        (4, 1, 4, 1),
        (4, 8, 1, 8),  # another recipe: left for the comparison to find
        (4, 8, 2, 8),
        (12, 12, 3, 4),
    ],
)
def test_the_accumulation_makes_up_for_the_processes(began: int, now: int, world: int, expected: int) -> None:
    before = {"plan": {"training": {"global_batch": 2 * began}}}
    found = in_world(recipe(2, now), recipe(2, began), before, world)
    assert found.training.gradient_accumulation_steps == expected


def test_a_batch_that_does_not_divide_is_refused() -> None:
    before = {"plan": {"training": {"global_batch": 8}}}
    with pytest.raises(RunDirError, match="3 processes cannot share it") as refused:
        in_world(recipe(2, 4), recipe(2, 4), before, 3)
    assert refused.value.help == "resume on 1, 2 or 4 processes"
    with pytest.raises(RunDirError) as refused:
        in_world(recipe(8, 1), recipe(8, 1), before, 2)
    assert refused.value.help == "resume on 1 process"


def test_a_line_says_what_changed() -> None:
    one: dict[str, Any] = {"world_size": 1, "gradient_accumulation_steps": 4, "global_batch": 8}
    two = one | {"world_size": 2, "gradient_accumulation_steps": 2}
    assert note_of(one, one, nn.Linear(1, 1)) == []
    (note,) = note_of(one, two, nn.Sequential(nn.Dropout(0.0)))
    assert note == (
        "note: 2 processes now, 1 before: gradient_accumulation_steps 2 instead of 4 keeps the global batch of 8 rows"
    )
    assert "dropout" in str(note_of(two, one, nn.Sequential(nn.Dropout(0.1))))


def test_a_run_begun_on_two_processes_goes_on_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = tiny.recipe(tmp_path, training={"gradient_accumulation_steps": 2, "max_steps": 4})
    train(tiny.recipe(tmp_path, training={"gradient_accumulation_steps": 4}, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Interrupted):
            # The same updates as those of two processes with half of it.
            train(tiny.recipe(tmp_path, training={"gradient_accumulation_steps": 4}))
    record = tmp_path / "run/run.json"
    data = json.loads(record.read_text())
    data["plan"]["training"] |= {"gradient_accumulation_steps": 2, "world_size": 2}
    data["resolved"]["training"] |= {"gradient_accumulation_steps": 2}
    record.write_text(json.dumps(data))
    done = train(loaded, resume=True)
    assert "1 process now, 2 before: gradient_accumulation_steps 4 instead of 2" in capsys.readouterr().err
    assert done["plan"]["training"]["gradient_accumulation_steps"] == 4
    assert done["resolved"]["training"]["gradient_accumulation_steps"] == 2, "what the recipe says"
    of = [[(e["loss"], e["grad_norm"]) for e in tiny.events(tmp_path / n, "step")] for n in ("run", "whole")]
    assert of[0] == of[1]


def test_another_batch_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Interrupted):
            train(tiny.recipe(tmp_path))
    with pytest.raises(RunDirError, match="gradient_accumulation_steps: 2 then, 4 now") as refused:
        train(tiny.recipe(tmp_path, training={"gradient_accumulation_steps": 4}), resume=True)
    assert "rows in an update: 2 then, 4 now" in str(refused.value)
