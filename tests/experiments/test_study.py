"""Studies as text: what is taken, and every mistake at its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftune.errors import FtuneError, RecipeError
from ftune.experiments.study import Budget, LoadedStudy, is_study, load_study, study_of


def load(tmp_path: Path, text: str) -> LoadedStudy:
    path = tmp_path / "orders.yaml"
    path.write_text(text)
    return load_study(path)


def test_the_shortest_study_compares_everything_with_lora_first(tmp_path: Path) -> None:
    loaded = load(tmp_path, "recipe: recipe.yaml\n")
    assert loaded.candidates[0].label == "lora"
    assert len(loaded.candidates) > 10
    assert loaded.root == Path("studies/orders")
    assert loaded.every


def test_lora_is_compared_where_it_is_not_named_and_blocks_get_labels(tmp_path: Path) -> None:
    loaded = load(tmp_path, "extends: r.yaml\nmethods: [dora, {name: lora, rank: 4}, {name: ia3, label: tiny}]\n")
    assert [(c.label, c.method, dict(c.fields)) for c in loaded.candidates] == [
        ("lora", "lora", {}),
        ("dora", "dora", {}),
        ("lora-rank4", "lora", {"rank": 4}),
        ("tiny", "ia3", {}),
    ]


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("recipe: r.yaml\nmethods: [lora, dorra]\n", "did you mean `dora`?", 2),
        ("recipe: r.yaml\nmetod: exact_match\n", "unknown field `metod`", 2),
        ("recipe: r.yaml\nseeds: 0\n", "`seeds`", 2),
        ("recipe: r.yaml\ntrials: many\n", "`trials`", 2),
        ("recipe: r.yaml\nprefer: speed\n", "`prefer`", 2),
        ("recipe: r.yaml\nbudget: soon\n", "write 2h", 2),
        ("recipe: r.yaml\nmetric: macro_f1\n", "take exact_match", 2),
        ("recipe: r.yaml\nmethods: [dora, dora]\n", "given twice", 2),
        ("recipe: r.yaml\nmethods: [{rank: 4}]\n", "has no `name`", 2),
        ("recipe: r.yaml\nmethods: [{name: dora, label: base}]\n", "before training", 2),
        ("recipe: r.yaml\nmethods: [{name: dora, label: ../up}]\n", "no name of a directory", 2),
        ("recipe: r.yaml\nmethods: [{name: dora, label: lora}]\n", "is LoRA's", None),
        ("methods: [lora]\n", "has no `recipe`", None),
        ("recipe: r.yaml\n---\nseeds: 2\n", "a study is one document", 2),
        ("- recipe: r.yaml\n", "a study is a mapping of fields", 1),
        ("recipe: r.yaml\nrecipe: s.yaml\n", "key `recipe` is given twice", 2),
    ],
)
def test_a_mistake_is_told_at_its_line(text: str, said: str, line: int | None, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, text)
    told = error.value.render()
    assert said in told
    assert line is None or f"orders.yaml:{line}" in told


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, "recipe: r.yaml\nseeds: 0\nmetod: x\n")
    assert "2 errors" in error.value.render()


def test_options_are_checked_as_a_file_is() -> None:
    assert study_of(Path("a/r.yaml"), methods=("dora",), seeds=None).root == Path("studies/r")
    with pytest.raises(FtuneError, match="unknown method `dorra`"):
        study_of(Path("r.yaml"), methods=("dorra",))
    with pytest.raises(FtuneError, match="`seeds`"):
        study_of(Path("r.yaml"), seeds=0)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2h", Budget("seconds", 7200)),
        ("90min", Budget("seconds", 5400)),
        ("1.5 hours", Budget("seconds", 5400)),
        ("5,000 steps", Budget("steps", 5000)),
        ("3M tokens", Budget("tokens", 3e6)),
        ("$20 at $2.50/h", Budget("seconds", 28_800)),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert Budget.read(text) == budget


@pytest.mark.parametrize("text", ["", "2", "h", "2 weeks", "$20", "-2h", "2h 5000 steps", "$1 at $0/h"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match="write 2h"):
        Budget.read(text)


def test_a_recipe_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\nmethod: lora\n# recipe: x\n")
    (tmp_path / "s.yaml").write_text("recipe: r.yaml\n")
    (tmp_path / "t.yaml").write_text("methods: [lora]\n")
    assert not is_study(tmp_path / "r.yaml")
    assert is_study(tmp_path / "s.yaml")
    assert not is_study(tmp_path)
