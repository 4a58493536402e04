"""What a run makes sure of before its first step."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import tiny

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import _rehearse
from ftune.errors import RunFailed
from ftune.plan.resolve import build, resolve

Usage = namedtuple("Usage", "total used free")


def test_checkpoints_are_counted_in_the_dtype_of_what_trains(tmp_path: Path, monkeypatch) -> None:
    recipe = tiny.recipe(tmp_path, "galore", model={"dtype": "bfloat16"}, checkpoint={"keep": 1}).recipe
    recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"weights": "bfloat16"})})
    plan = resolve(recipe)
    model, _ = build(plan)
    state = recipe.method.optimizer_bytes(plan.shape, "adamw")
    needed = 3 * 2 * plan.shape.parameters + 2 * state  # bf16: two checkpoints for a moment, and the model
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, free))
        if fits:
            _rehearse(plan, model, run)
        else:
            with pytest.raises(RunFailed, match="checkpoints need"):
                _rehearse(plan, model, run)
