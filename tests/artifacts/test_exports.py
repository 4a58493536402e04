"""Whether a run merges and loads without ftune is found out by doing it, and a difference is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

from ftune.artifacts import exports
from ftune.artifacts.divergence import MAX_ERROR_FP32
from ftune.artifacts.exports import check_exports
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.methods import METHODS


def run_of(where: Path, name: str) -> RunDir:
    train(tiny.recipe(where, name))
    return RunDir(where / "run")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_does_what_it_says(name: str, tmp_path: Path) -> None:
    found, cls = check_exports(run_of(tmp_path, name)), METHODS[name]
    assert found["load"]["library"] == cls.saved_as
    if cls.mergeable:
        assert found["merge"]["error"] <= MAX_ERROR_FP32
        assert found["merge"]["why"] is None
    else:
        assert found["merge"] == {"error": None, "why": cls.not_mergeable_because}
    if cls.saved_as == "ftune":
        assert found["load"]["error"] is None
        assert found["load"]["why"]
    else:
        assert found["load"]["error"] <= MAX_ERROR_FP32


def test_the_error_is_that_of_a_merge(tmp_path: Path) -> None:
    run = run_of(tmp_path, "lora")
    assert check_exports(run)["merge"]["error"] == merge(run)["merge_error"]
    assert not (tmp_path / "run/other").exists()


def test_an_adapter_that_loads_as_another_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, "lora")
    file = run.root / "adapter/adapter_model.safetensors"
    load = exports.load_peft

    def damaged(*arguments: object) -> object:
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
        return load(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(exports, "load_peft", damaged)
    found = check_exports(run)
    assert found["merge"]["why"] is None
    assert "more than rounding" in found["load"]["why"]


def test_what_does_not_fit_in_memory_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "fits_in_memory", lambda recipe, scale: False)
    found = check_exports(run_of(tmp_path, "lora"))
    assert [one["error"] for one in found.values()] == [None, None]
    assert "not checked" in found["merge"]["why"]
