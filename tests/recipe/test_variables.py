"""Variables of the environment in a recipe are put in, or refused at their place."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from ftune.artifacts.training import train
from ftune.errors import RecipeError
from ftune.recipe import load_checked, parse_recipe
from ftune.recipe.load import Loaded
from ftune.recipe.variables import Expanded

RECIPE = "model: org/tiny\nmethod: lora\ndata: rows.jsonl\noutput_dir: runs/x\n"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DISK": "/big/disk",
        "EMPTY": "",
        "STEPS": "20",
        "RATE": "2e-4",
        "NUMBER": "123",
        "FLAG": "true",
        "TRICK": "{a: b} # ${DISK}",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)


def parsed(change: str, *overrides: str) -> Loaded:
    key = change.partition(":")[0]
    kept = [line for line in RECIPE.splitlines() if not line.startswith(f"{key}:")]
    return parse_recipe("\n".join([*kept, change]), "r.yaml", overrides)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("${DISK}/x", "/big/disk/x"),
        ("${DISK}/${NUMBER}/y", "/big/disk/123/y"),
        ("${UNSET:-runs}/x", "runs/x"),
        ("${EMPTY:-runs}/x", "runs/x"),
        ("${DISK:-runs}", "/big/disk"),
        ("a${EMPTY}b", "ab"),
        ("$${DISK}", "${DISK}"),
        ("a$b$$c", "a$b$$c"),
        ("${NUMBER}", "123"),
        ("${TRICK}", "{a: b} # ${DISK}"),
        ("${UNSET:-}x", "x"),
    ],
)
@pytest.mark.parametrize("style", ["{}", "'{}'", '"{}"'])
def test_strings(written: str, meant: str, style: str) -> None:
    loaded = parsed(f"output_dir: {style.format(written)}")
    assert loaded.recipe.output_dir == meant
    assert type(loaded.recipe.output_dir) is str
    assert written in loaded.text  # which run.json keeps


@pytest.mark.parametrize(
    ("change", "at", "meant"),
    [
        ("training: {max_steps: '20', epochs: 1}", None, None),
        ("training: {max_steps: ${STEPS}}".replace("${STEPS}", '"${STEPS}"'), None, None),
        ("training:\n  max_steps: ${STEPS}", ("training", "max_steps"), 20),
        ("training:\n  max_steps: ${UNSET:-7}", ("training", "max_steps"), 7),
        ("training:\n  max_steps: ${UNSET:-null}", ("training", "max_steps"), None),
        ("optimizer:\n  learning_rate: ${RATE}", ("optimizer", "learning_rate"), 2e-4),
        ("optimizer:\n  betas:\n  - ${UNSET:-0.5}\n  - 0.9", ("optimizer", "betas"), (0.5, 0.9)),
        ("training:\n  cuda_graphs: ${FLAG}", ("training", "cuda_graphs"), True),
    ],
)
def test_numbers_as_yaml_reads_them_and_strings_in_quotes(change: str, at: tuple[str, ...] | None, meant: Any) -> None:
    if at is None:
        with pytest.raises(RecipeError):
            parsed(change)
        return
    value: Any = parsed(change).recipe
    for name in at:
        value = getattr(value, name)
    assert value == meant
    assert type(value) is type(meant)


@pytest.mark.parametrize(
    ("written", "said", "column"),
    [
        ("output_dir: a/${UNSET}/b", "the environment variable `UNSET` is not set", 15),
        ("output_dir: '${UNSET}'", "the environment variable `UNSET` is not set", 14),
        ("output_dir: ${STEP}", "did you mean `STEPS`", 13),
        ("output_dir: ${}", "`${}` is no variable", 13),
        ("output_dir: ${1a}", "is no variable", 13),
        ("output_dir: ${DISK", "is no variable", 13),
        ("output_dir: ${DISK:+x}", "is no variable", 13),
        ("output_dir: ${UNSET:-${DISK}}", "is no variable", 13),
    ],
)
def test_what_cannot_be_put_in_is_refused_at_its_place(written: str, said: str, column: int) -> None:
    with pytest.raises(RecipeError) as refused:
        parsed(written)
    assert said in str(refused.value)
    assert f"r.yaml:4:{column}" in str(refused.value)
    assert "$${" in str(refused.value)


def test_all_of_them_at_once_and_on_the_command_line_too() -> None:
    with pytest.raises(RecipeError) as refused:
        parsed("output_dir: ${UNSET}", "data=${ALSO_UNSET}", "model=${THIRD}")
    assert len(refused.value.reports) == 3
    assert (
        parsed("output_dir: x", "output_dir=${DISK}/z", "training.max_steps=${STEPS}").recipe.training.max_steps == 20
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda text: pickle.loads(pickle.dumps(text))])
def test_what_was_put_in_can_be_copied_and_sent_to_other_processes(copied: Callable[[Expanded], Expanded]) -> None:
    again = copied(Expanded("20", 20))
    assert (again, again.typed) == ("20", 20)


def test_keys_and_comments_are_left_alone() -> None:
    assert parsed("output_dir: x  # ${UNSET}").recipe.output_dir == "x"
    with pytest.raises(RecipeError, match="unknown field"):
        parsed("'${DISK}': x")


def test_a_variable_without_braces_is_no_directory(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, output_dir="$HOME/runs")
    (tmp_path / "r.yaml").write_text(loaded.text)
    with pytest.raises(RecipeError, match=r"`\$HOME` is not expanded") as refused:
        load_checked(tmp_path / "r.yaml")
    assert "write `${HOME}`" in str(refused.value)


def test_a_secret_is_refused_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "0123456789abcdef")
    loaded = tiny.recipe(tmp_path)
    data = json.loads(loaded.text) | {"output_dir": str(tmp_path / "run-${MY_TOKEN}")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match="MY_TOKEN") as refused:
        load_checked(tmp_path / "r.yaml")
    assert "0123456789abcdef" not in refused.value.render()


def test_run_json_has_the_recipe_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", str(tmp_path))
    text = tiny.recipe(tmp_path).text.replace(str(tmp_path / "run"), "${WHERE}/run")
    train(parse_recipe(text, "r.yaml"), progress=False)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert "${WHERE}/run" in record["recipe"]
    assert record["resolved"]["output_dir"] == str(tmp_path / "run")
    assert not list(tmp_path.glob("$*"))
