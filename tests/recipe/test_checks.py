"""What is not refused: good recipes pass, and advice is a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftune.methods import METHODS
from ftune.recipe import check, parse_recipe, warnings
from ftune.recipe.checks import advise, metric_names


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ftune.recipe.checks.is_installed", lambda package: True)


def recipe(extra: str = "", method: str = "lora", data: str = "train.jsonl") -> str:
    return f"model: org/tiny\nmethod: {method}\ndata: {data}\noutput_dir: runs/x\n{extra}"


@pytest.mark.parametrize("method", METHODS)
def test_the_shortest_recipe_of_every_method_passes(method: str) -> None:
    loaded = parse_recipe(recipe(method=method), "r.yaml")
    assert check(loaded.recipe) == []
    assert advise(loaded.recipe) == []


def test_a_resolved_recipe_passes_again() -> None:
    """``run.json`` keeps every field, defaults included: none of them counts as given by the user."""
    loaded = parse_recipe(
        recipe("evaluation: {metrics: [exact_match]}\n", data="{train: train.jsonl, eval_fraction: 0.1}"), "r"
    )
    again = type(loaded.recipe).model_validate_json(loaded.recipe.model_dump_json())
    assert again == loaded.recipe
    assert check(again) == []


@pytest.mark.parametrize(
    ("extra", "data", "words"),
    [
        ("training: {micro_batch_size: 64, gradient_accumulation_steps: 128}\n", "train.jsonl", "8192 rows"),
        ("optimizer: {learning_rate: 1}\n", "train.jsonl", "5000 times"),
        ("training: {max_steps: 5}\ncheckpoint: {every_steps: 10}\n", "train.jsonl", "never pass"),
        ("", "{train: train.jsonl, eval: train.jsonl}", "are the training rows"),
        ("", r"{train: {path: train.jsonl, columns: {prompt: 'a {q}\n', completion: b}}}", "no line break"),
    ],
)
def test_advice(extra: str, data: str, words: str) -> None:
    loaded = parse_recipe(recipe(extra, data=data), "r.yaml")
    assert check(loaded.recipe) == []
    (report,) = warnings(loaded)
    assert report.startswith("warning: ")
    assert words in report
    assert "--> r.yaml:" in report


def test_a_metric_of_an_installed_package_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site/other-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ftune.metrics]\nrouge = other:rouge\n")
    text = recipe(
        "evaluation: {metrics: [{name: rouge, pattern: l}]}\n",
        data="{train: train.jsonl, eval_fraction: 0.1}",
    )
    loaded = parse_recipe(text, "r.yaml")
    assert [problem.loc for problem in check(loaded.recipe)] == [("evaluation", "metrics", 0, "name")]
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "rouge" in metric_names()
    assert check(loaded.recipe) == []


def test_packing_needs_a_method_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = parse_recipe(recipe(data="{train: train.jsonl, packing: true}"), "r.yaml")
    assert check(loaded.recipe) == []
    monkeypatch.setattr(type(loaded.recipe.method), "packable", False)
    assert [problem.loc for problem in check(loaded.recipe)] == [("data", "packing")]


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if not cls.packable])
@pytest.mark.parametrize("packing", ["auto", "false"])
def test_what_is_offered_instead_of_packing_passes(method: str, packing: str) -> None:
    data = "{train: train.jsonl, packing: %s}"
    (problem,) = check(parse_recipe(recipe(method=method, data=data % "true"), "r").recipe)
    assert f"`packing: {packing}`" in (problem.help or "")
    assert check(parse_recipe(recipe(method=method, data=data % packing), "r").recipe) == []
