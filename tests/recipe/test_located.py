"""What a recipe names cannot lead out of where it should be, nor trip the path functions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ftune.errors import ModelError, RecipeError
from ftune.recipe import check, locate_model, parse_recipe
from ftune.recipe.schema import ModelSpec

LONG = "a" * 5000


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    inside = tmp_path / "site/weights_kit"
    inside.mkdir(parents=True)
    (inside / "__init__.py").write_text("raise RuntimeError('imported')")
    (inside / "model.gguf").touch()
    (tmp_path / "site/outside.gguf").touch()
    (inside / "linked.gguf").symlink_to(tmp_path / "site/outside.gguf")
    (inside / "up").symlink_to(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return inside


@pytest.mark.parametrize(
    "path",
    ["../outside.gguf", "x/../../outside.gguf", "/etc/x.gguf", "./model.gguf", "linked.gguf", "up/outside.gguf"]
    + ["..\\outside.gguf", "c:x.gguf", "", "\0", LONG],
)
def test_package_paths_stay_in_the_package(package: Path, path: str) -> None:
    assert locate_model(ModelSpec(id="package://weights_kit/model.gguf")).path_or_id == str(package)
    with pytest.raises(ModelError):
        locate_model(ModelSpec(id=f"package://weights_kit/{path}"))


@pytest.mark.parametrize("name", ["weights_kit.sub", "os/..", "../x", ".", "", "weights-kit"])
def test_package_names_are_plain(package: Path, name: str) -> None:
    with pytest.raises(ModelError):
        locate_model(ModelSpec(id=f"package://{name}/model.gguf"))


@pytest.mark.parametrize("file", ["../x.gguf", "/x.gguf", "a/../../x.gguf", "\0.gguf"])
@pytest.mark.parametrize("model", ["directory", "org/name"])
def test_a_gguf_file_stays_in_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ModelError, match="leads out|cannot be a path"):
        locate_model(ModelSpec(id=model, gguf_file=file))


@pytest.mark.parametrize(
    "field", ["model.id", "model.gguf_file", "data.train.path", "data.chat_template", "output_dir"]
)
@pytest.mark.parametrize("value", [LONG, "a/" * 3000 + "b", "~nobody_here/x"])
def test_any_text_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"text": "a"}\n')
    text = "model: org/tiny\nmethod: lora\ndata: data.jsonl\noutput_dir: runs/x\n"
    problems = check(parse_recipe(text, "r", [f"{field}={value}"]).recipe)
    assert problems


def test_weights_that_are_only_a_pickle_are_refused_while_parsing(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "pytorch_model.bin").touch()
    spec = ModelSpec(id=str(tmp_path))
    with pytest.raises(ModelError, match="pickle"):
        locate_model(spec)
    (tmp_path / "model.safetensors").touch()
    assert locate_model(spec).kind == "directory"


def test_a_fifo_as_a_recipe_or_as_data_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("rows.jsonl")
    text = "model: org/tiny\nmethod: lora\ndata: rows.jsonl\noutput_dir: runs/x\n"
    assert "no data file" in check(parse_recipe(text, "r").recipe)[0].message


def test_trust_is_never_set_from_the_command_line() -> None:
    text = "model: org/tiny\nmethod: lora\ndata: data.jsonl\noutput_dir: runs/x\n"
    for option in ("model.trust_remote_code=true", "model={id: org/x, trust_remote_code: true}"):
        with pytest.raises(RecipeError, match="trust_remote_code"):
            parse_recipe(text, "r", [option])
