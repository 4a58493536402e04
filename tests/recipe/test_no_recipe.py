"""What is named as a recipe and is none: the message says what it is and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftune.errors import RecipeError
from ftune.recipe.load import load_recipe

ROW = '{"prompt": "a", "completion": "b"}\n'
RECIPE = '{"model": "org/tiny", "method": "lora", "data": "org/rows", "output_dir": "runs/x"}'


def said(path: Path) -> str:
    with pytest.raises(RecipeError) as at_fault:
        load_recipe(path)
    return str(at_fault.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", ROW),
        ("rows.jsonl", ROW * 10_000),
        ("rows.CSV", "prompt,completion\na,b\n"),
        ("rows.tsv", "a\tb\n"),
        ("rows.parquet", "PAR1\x00\x01"),
        ("rows.json", f"[{ROW}]"),
        ("rows.json", ROW * 2),
    ],
)
def test_rows(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    text = said(path)
    assert "this is a data file, and not a recipe" in text
    assert f"`ftune init lora --data {path}`" in text


@pytest.mark.parametrize(
    ("name", "help"),
    [("x.jsonl.gz", "unpack it"), ("x.xlsx", "save it as .csv"), ("x.pkl", "pandas.read_pickle")],
)
def test_rows_that_are_not_read_either_say_what_to_do_first(name: str, help: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\x1f")
    text = said(tmp_path / name)
    assert help in text
    assert "; then `ftune init lora --data FILE` writes a recipe" in text


def test_toml_and_json(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[model]\nid = "org/tiny"\n')
    assert "this is TOML, and recipes are YAML" in said(tmp_path / "r.toml")
    (tmp_path / "r.json").write_text(RECIPE)  # which is YAML, too
    assert load_recipe(tmp_path / "r.json").recipe.model.id == "org/tiny"
    (tmp_path / "r.json").write_text("{}")
    assert "data file" not in said(tmp_path / "r.json")


def test_a_directory(tmp_path: Path) -> None:
    assert "`ftune init` writes a recipe" in said(tmp_path)
    (tmp_path / "b.yaml").touch()
    assert f"name the file: `{tmp_path / 'b.yaml'}`" in said(tmp_path)
    (tmp_path / "a.yml").touch()
    assert f"`{tmp_path / 'a.yml'}`, or another of its 2 .yaml files" in said(tmp_path)
    (tmp_path / "run.json").touch()
    assert "it is a run" in said(tmp_path)
