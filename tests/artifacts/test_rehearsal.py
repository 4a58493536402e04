"""What a run makes sure of before its first step."""

from __future__ import annotations

import copy
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import tiny

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import _rehearse, train
from ftune.errors import RunDirError, RunFailed
from ftune.plan.build import build
from ftune.plan.resolve import resolve

Usage = namedtuple("Usage", "total used free")


# Of 4 updates: every third, and the last.
@pytest.mark.parametrize(
    ("every", "keep", "copies"),
    [(None, 1, 1), (None, 5, 1), (4, 1, 1), (1, 1, 2), (1, 2, 3), (1, 9, 4), (3, 1, 2), (3, 9, 2)],
)
def test_checkpoints_are_counted_in_the_dtype_of_what_trains(
    every: int | None, keep: int, copies: int, tmp_path: Path, monkeypatch
) -> None:
    settings = {"keep": keep} | ({"every_steps": every} if every else {})
    recipe = tiny.recipe(tmp_path, "galore", model={"dtype": "bfloat16"}, checkpoint=settings).recipe
    recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"weights": "bfloat16"})})
    plan = resolve(recipe)
    assert plan.total_steps == 4
    model, _ = build(plan)
    state = recipe.method.optimizer_bytes(plan.shape, "adamw")
    # bf16: checkpoints, one more than are kept for a moment if so many are written, and the model
    needed = (copies + 1) * 2 * plan.shape.parameters + copies * state
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, free))
        if fits:
            _rehearse(plan, model, run)
        else:
            with pytest.raises(RunFailed, match="checkpoints need"):
                _rehearse(plan, model, run)


def test_a_tokenizer_with_several_chat_templates_is_saved_and_read_back(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, training={"max_steps": 1})
    several = copy.deepcopy(tiny.tokenizer())
    several.chat_template = {"default": tiny.CHATML, "tool_use": tiny.CHATML}
    several.save_pretrained(tmp_path / "base")
    assert train(loaded)["status"] == "finished"
    run = RunDir(tmp_path / "run")
    template = run.artifact(loaded.recipe) / "additional_chat_templates" / "tool_use.jinja"
    template.write_text("another")
    with pytest.raises(RunDirError, match=r"additional_chat_templates/tool_use\.jinja is not the file"):
        run.artifact(loaded.recipe)
    template.unlink()
    with pytest.raises(RunDirError, match=r"additional_chat_templates/tool_use\.jinja is missing"):
        run.artifact(loaded.recipe)
