"""What `auto` came out as when a run began holds for the whole run, whatever is measured later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from run.test_loop import train_until

from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target
from ftune.errors import RunDirError
from ftune.plan import precision
from ftune.run.checkpoint import Checkpoints


def finds_bfloat16(patch: pytest.MonkeyPatch, fast: bool) -> None:
    """Have bfloat16 be faster than float32 or not: a CPU is timed, a GPU is asked."""
    patch.setattr(precision, "bf16_speedup", lambda device: 2.0 if fast else 0.5)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: fast)


def test_a_run_keeps_the_dtype_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny.recipe(tmp_path, model={"dtype": "auto"})
    (tmp_path / "recipe.yaml").write_text(loaded.text)
    finds_bfloat16(monkeypatch, True)
    train_until(loaded, 2)

    finds_bfloat16(monkeypatch, False)
    record = train(loaded, resume=True)
    assert record["resolved"]["model"]["dtype"] == "bfloat16"
    assert record["measured"]["steps"] == 4
    run = RunDir(tmp_path / "run")
    for target in (tmp_path / "run", tmp_path / "recipe.yaml"):
        assert find_target(target).recipe.model.dtype == "bfloat16"
    tuned = evaluate(find_target(tmp_path / "recipe.yaml"), base=False)["tuned"]["loss"]
    # training attends by document, evaluation with a mask: the same up to bfloat16's rounding
    assert tuned == pytest.approx(tiny.events(tmp_path / "run", "eval")[-1]["loss"], rel=1e-3)
    assert merge(run)["dtype"] == "bfloat16"
    assert train(loaded, overwrite=True)["resolved"]["model"]["dtype"] == "float32", "a new run is measured anew"


def test_what_a_recipe_says_is_not_what_the_run_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finds_bfloat16(monkeypatch, True)
    train(tiny.recipe(tmp_path, model={"dtype": "auto"}))
    asked = tiny.recipe(tmp_path, model={"dtype": "float32"})
    assert RunDir(tmp_path / "run").as_begun(asked.recipe).model.dtype == "float32"
    (tmp_path / "recipe.yaml").write_text(asked.text)
    with pytest.raises(RunDirError, match="another `model`"):
        find_target(tmp_path / "recipe.yaml")


def test_a_run_of_another_version_is_one_sentence(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path)
    (tmp_path / "run").mkdir()
    plan = {"training": {"steps": 4, "global_batch": 2}, "data": {"fingerprint": "x", "format": "text"}}
    record = {"resolved": {"version": 0}, "plan": plan, "status": "interrupted"}
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    with pytest.raises(RunDirError, match="does not fit this version"):
        train(loaded, resume=True)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_run_that_began_with_compiled_kernels_goes_on_without(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As earlier versions left it: ``training.compile`` in run.json, what was decided in the checkpoint."""
    loaded, save = tiny.recipe(tmp_path), Checkpoints.save
    with monkeypatch.context() as before:
        before.setattr(
            Checkpoints,
            "save",
            lambda self, step, model, method, optimizer, progress, gathered: save(
                self, step, model, method, optimizer, progress | {"compile": compiled}, gathered
            ),
        )
        train_until(loaded, 2)
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_text())
    record["resolved"]["training"]["compile"] = True
    path.write_text(json.dumps(record))
    assert "compile" not in find_target(tmp_path / "run").recipe.training.model_dump()
    capsys.readouterr()

    record = train(loaded, resume=True)
    assert ("warning: the run began with compiled norms and gates" in capsys.readouterr().err) is compiled
    assert record["measured"]["steps"] == 4
    assert "compile" not in record["resolved"]["training"]
    assert "compile" not in json.loads((tmp_path / "run/checkpoints/step-4/progress.json").read_text())
