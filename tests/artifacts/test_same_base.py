"""Other weights under a run's base path are refused by every command that needs them; a moved base is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ftune.artifacts.convert import to_lora
from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target
from ftune.errors import ModelError, RunDirError
from ftune.recipe.load import Loaded, load_recipe

OTHER = "was trained on other weights, or another config.json"


def trained(where: Path, method: str = "lora", /, **blocks: Any) -> tuple[Loaded, RunDir]:
    loaded = tiny.recipe(where, method, **blocks)
    (where / "recipe.yaml").write_text(loaded.text)
    train(loaded, progress=False)
    return loaded, RunDir(where / "run")


def change(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor * 1.01 for name, tensor in weights.items()}, directory / "model.safetensors", {"format": "pt"}
    )


def test_evaluation_merge_and_conversion_refuse_other_weights(tmp_path: Path) -> None:
    _, run = trained(tmp_path, "adalora", training={"max_steps": 20})
    change(tmp_path / "base")
    for read in (
        lambda: find_target(run.root),
        lambda: find_target(tmp_path / "recipe.yaml"),
        lambda: merge(run),
        lambda: merge(run, by_shard=True),
        lambda: to_lora(run),
    ):
        with pytest.raises(RunDirError, match=OTHER) as error:
            read()
        assert "put the base model back" in (error.value.help or "")
    assert not (run.root / "merged").exists()


def test_a_base_that_is_not_there_is_not_taken_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path may have the form of a hub id, `bases/tiny`."""
    tiny.model_dir(tmp_path / "bases/tiny")
    monkeypatch.chdir(tmp_path)
    loaded = tiny.recipe(tmp_path, model="bases/tiny", training={"max_steps": 2})
    train(loaded, progress=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(
        ModelError, match="there is no `bases/tiny` here, the base model that .* was trained on"
    ) as error:
        find_target(tmp_path / "run")
    assert "a link to it" in (error.value.help or "")


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"model": "run/merged"}, "run/merged"),
        ({"model": "run/model"}, "run/model"),
        ({"data": {"train": "run/predictions.jsonl"}}, "run/predictions.jsonl"),
        ({"data": {"train": "train.jsonl", "eval": "run/evaluations"}}, "run/evaluations/x.jsonl"),
    ],
)
def test_a_run_is_not_replaced_by_one_that_needs_its_files(
    inputs: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, run = trained(tmp_path, "full", training={"max_steps": 2})
    merge(run)
    (run.root / "evaluations").mkdir(exist_ok=True)
    shutil.copy("train.jsonl", "run/evaluations/x.jsonl")
    shutil.copy("train.jsonl", "run/predictions.jsonl")
    before = sorted(run.root.rglob("*"))
    again = tiny.recipe(tmp_path, "full", output_dir="run", training={"max_steps": 2}, **inputs)
    with pytest.raises(RunDirError, match=f"{named} is of the run in run, and --overwrite would delete it"):
        train(again, overwrite=True, progress=False)
    assert sorted(run.root.rglob("*")) == before


def test_resuming_over_other_weights_is_refused_unless_accepted(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, training={"max_steps": 2})
    train(loaded, progress=False)
    change(tmp_path / "base")
    with pytest.raises(RunDirError, match="the content of the model files") as error:
        train(loaded, resume=True, progress=False)
    assert "--accept-changed-model" in (error.value.help or "")


def swapped(base: Path) -> None:
    """Give two letters each other's token."""
    path = base / "tokenizer.json"
    told = json.loads(path.read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["a"], vocabulary["s"] = vocabulary["s"], vocabulary["a"]
    path.write_text(json.dumps(told))


def renamed(base: Path) -> None:
    path = base / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "robot"))


@pytest.mark.parametrize(("change", "what"), [(swapped, "tokenizer"), (renamed, "chat template")])
def test_another_tokenizer_or_template_of_the_base_is_refused(
    tmp_path: Path, change: Callable[[Path], None], what: str
) -> None:
    loaded, run = trained(tmp_path, training={"max_steps": 2})
    change(tmp_path / "base")
    for read in (lambda: find_target(run.root), lambda: find_target(tmp_path / "recipe.yaml"), lambda: merge(run)):
        with pytest.raises(RunDirError, match=f"was trained with another {what} than") as error:
            read()
        assert str(run.root / "adapter") in (error.value.help or "")
    run.write(run.read() | {"status": "interrupted"})
    with pytest.raises(RunDirError, match=f"the {what}") as error:
        train(loaded, resume=True, progress=False)
    assert "data" not in str(error.value)
    train(loaded, resume=True, accept_changed_model=True, progress=False)
    find_target(run.root)  # it is a run of the new one now


def test_a_recipe_s_own_template_is_held_too_and_saving_a_tokenizer_anew_changes_nothing(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    tiny.recipe(tmp_path)
    template.write_text((tmp_path / "base/chat_template.jinja").read_text())
    _, run = trained(tmp_path, data={"chat_template": str(template)}, training={"max_steps": 2})
    renamed(tmp_path / "base")
    again = AutoTokenizer.from_pretrained(tmp_path / "base")
    again(["a", "bb"], padding=True, truncation=True, max_length=1)
    again.save_pretrained(tmp_path / "base")
    find_target(run.root)
    template.write_text(template.read_text() + "{# another #}")
    with pytest.raises(RunDirError, match=f"another chat template than `{template}`"):
        find_target(run.root)


def test_an_accepted_change_is_kept_in_the_record(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path)
    before = train(loaded, progress=False)
    run = RunDir(tmp_path / "run")
    run.write(run.read() | {"status": "interrupted"})
    change(tmp_path / "base")
    record = train(loaded, resume=True, accept_changed_model=True, progress=False)
    (swap,) = record["model_changed"]
    assert swap["after_step"] == 4
    assert swap["fingerprint"][0] == before["plan"]["model"]["fingerprint"]
    assert record["plan"]["model"]["fingerprint"] == swap["fingerprint"][1]
    find_target(run.root)  # it is a run of the new one now


def test_a_moved_base_is_taken(tmp_path: Path) -> None:
    loaded, run = trained(tmp_path)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    path = tmp_path / "recipe.yaml"
    path.write_text(loaded.text.replace(str(tmp_path / "base"), str(tmp_path / "elsewhere")))
    target = find_target(path)
    assert target.recipe.model.id == str(tmp_path / "elsewhere")
    assert evaluate(target, base=False)["tuned"]["loss"] > 0
    run.write(run.read() | {"status": "interrupted"})
    record = train(load_recipe(path), resume=True, progress=False)
    assert record["resolved"]["model"]["id"] == str(tmp_path / "elsewhere")
    merge(run)


def test_another_base_at_another_path_is_refused(tmp_path: Path) -> None:
    loaded, _ = trained(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    change(tmp_path / "other")
    path = tmp_path / "recipe.yaml"
    path.write_text(loaded.text.replace(str(tmp_path / "base"), str(tmp_path / "other")))
    with pytest.raises(RunDirError, match="another `model`"):
        find_target(path)
    with pytest.raises(RunDirError, match=r"model.id"):
        train(load_recipe(path), resume=True, progress=False)


def test_a_run_without_a_fingerprint_is_read_as_before(tmp_path: Path) -> None:
    loaded, run = trained(tmp_path)
    record = run.read()
    del record["plan"]["model"]["fingerprint"]
    run.record_path.write_text(json.dumps(record | {"status": "interrupted"}))
    change(tmp_path / "base")
    find_target(run.root)
    assert train(loaded, resume=True, progress=False)["plan"]["model"]["fingerprint"]
