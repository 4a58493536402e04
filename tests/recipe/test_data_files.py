"""Which files of a directory are meant."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from ftune.data.read import read_source
from ftune.data.tokenize import load_splits
from ftune.errors import DataError
from ftune.recipe import check, locate_data, parse_recipe
from ftune.recipe.checks import advise
from ftune.recipe.schema import DataSource, DataSpec


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ftune.recipe.checks.is_installed", lambda package: True)


def fill(*names: str, text: str = '{"text": "a row"}\n') -> None:
    for name in names:
        path = Path("d", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def files(key: Literal["train", "eval"] = "train", *without: str) -> list[str]:
    located = locate_data(DataSource(path="d"), key, [Path("d", name) for name in without])
    return [file.name for file in located.files]


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["train.jsonl", "validation.jsonl", "test.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
        (["my-train-00000-of-2.jsonl", "my-dev-1.jsonl"], ["my-train-00000-of-2.jsonl"], ["my-dev-1.jsonl"]),
        (["a.jsonl", "b.jsonl", "EVAL.jsonl", "c_valid.jsonl"], ["a.jsonl", "b.jsonl"], ["c_valid.jsonl"]),
        (["latest.jsonl", "contest.jsonl"], ["contest.jsonl", "latest.jsonl"], ["contest.jsonl", "latest.jsonl"]),
        (["train_test.jsonl"], ["train_test.jsonl"], ["train_test.jsonl"]),
        (["a.csv", "étest.csv", "dev.v2.csv"], ["a.csv", "étest.csv"], ["dev.v2.csv"]),
        # documents: the whole name, beside a train file
        (["intro.txt", "train.txt", "TEST.txt"], ["intro.txt", "train.txt"], ["TEST.txt"]),
        (
            ["train-00000-of-00001.txt", "test-00000-of-00001.txt"],
            ["train-00000-of-00001.txt"],
            ["test-00000-of-00001.txt"],
        ),
        (["train.txt", "how-to-test.txt", "val.txt"], ["how-to-test.txt", "train.txt"], ["val.txt"]),
    ],
)
def test_a_file_named_for_another_split_is_left_out(names: list[str], train: list[str], held_out: list[str]) -> None:
    fill(*names)
    assert files() == train
    assert files("eval") == held_out


def test_documents_named_for_their_subjects_are_all_read() -> None:
    names = ["api.txt", "dev-setup.txt", "evaluation-of-plans.txt", "how-to-test.txt", "test.txt", "training-plan.txt"]
    fill(*names, "test_2.txt", text="Some words.")
    assert files() == files("eval") == [*names[:5], "test_2.txt", names[5]]


def test_what_is_left_out_of_held_out_data_is_told_with_its_true_reason() -> None:
    fill("train.jsonl", "test.jsonl", "dev.jsonl", "notes.jsonl")
    assert locate_data(DataSource(path="d"), "eval").left_out == (
        "test.jsonl (named for another split: test)",
        "train.jsonl (named for another split: train)",
        "notes.jsonl (not named for a split, as dev.jsonl is)",
    )


def test_what_is_left_out_is_told() -> None:
    fill("train.jsonl", "test.jsonl", "README.txt", "LICENSE", "more.jsonl.gz", ".hidden.jsonl", "inner/x.jsonl")
    fill("dataset_infos.json")
    rows, _ = read_source(DataSource(path="d"))
    assert rows.notes == (
        "data.train: left out of d: test.jsonl (named for another split: test)",
        "data.train: left out of d: README.txt, dataset_infos.json (about the data, by its name)",
        "data.train: left out of d: more.jsonl.gz (no data file)",
        "data.train: left out of d: inner (a directory)",
    )


def test_nothing_for_a_split_names_what_there_is() -> None:
    fill("test.jsonl")
    with pytest.raises(DataError, match="every data file in `d` is named for another split: test.jsonl") as caught:
        files()
    assert caught.value.help == "name the file itself: `d/test.jsonl`"
    assert locate_data(DataSource(path="d/test.jsonl")).files == (Path("d/test.jsonl"),)


def test_a_directory_whose_files_are_all_held_out_says_so() -> None:
    fill("a.txt", "test.txt", text="Some words.")
    with pytest.raises(DataError, match=r"in `d` that could be trained on is held out: a.txt, test.txt") as caught:
        files("train", "a.txt", "test.txt")
    assert "`eval_fraction`" in (caught.value.help or "")


@pytest.mark.parametrize(
    ("name", "help"),
    [
        ("x.jsonl.gz", "unpack it: compressed files are not read"),
        ("t.xlsx", "save it as .csv, in UTF-8"),
        (
            "r.pkl",
            "in Python, if you trust the file, "
            '`pandas.read_pickle(...).to_json("rows.jsonl", orient="records", lines=True)`',
        ),
        ("rows.ndjson", "name it .jsonl"),
        (
            "data-00000-of-00001.arrow",
            "in Python, read it with `datasets.Dataset.from_file` (a directory: `datasets.load_from_disk`) and write "
            'it with `.to_json("rows.jsonl")`',
        ),
    ],
)
def test_a_file_that_is_not_read_says_what_to_do(name: str, help: str) -> None:
    fill(name)
    for path, words in (("d", "no data files in `d`"), (f"d/{name}", "is no data file")):
        with pytest.raises(DataError, match=words) as caught:
            locate_data(DataSource(path=path))
        assert caught.value.help == help


def test_a_directory_of_directories_names_them() -> None:
    fill("train/x.jsonl", "test/x.jsonl")
    with pytest.raises(DataError, match="no data files in `d`") as caught:
        files()
    assert caught.value.help == "name one of the directories in it: test, train"


def test_held_out_files_are_not_trained_on() -> None:
    from data.kit import build_tokenizer

    fill("a.jsonl", "b.jsonl")
    assert files("train", "b.jsonl") == ["a.jsonl"]
    spec = DataSpec(train=DataSource(path="d"), eval=DataSource(path="d/b.jsonl"))
    splits = load_splits(spec, build_tokenizer(), seed=0)
    assert splits.train.rows.origin == ("d/a.jsonl",)
    assert splits.train.rows.notes == ("data.train: left out of d: b.jsonl (held out)",)


def test_one_directory_for_both_is_no_mistake_where_it_has_files_for_both() -> None:
    fill("train.jsonl", "test.jsonl")
    text = "model: org/tiny\nmethod: lora\ndata: {train: d, eval: d}\noutput_dir: runs/x\n"
    recipe = parse_recipe(text, "r.yaml").recipe
    assert check(recipe) == []
    assert advise(recipe) == []


@pytest.mark.parametrize(
    ("name", "split_on", "words"),
    [
        ("a.jsonl", "line", "cuts .txt files, and this is none"),
        ("a.txt", "", "`split_on` is empty"),
        ("a.txt", "lines", "cannot be the word `lines`"),
        ("a.txt", "paragraph", "cannot be the word `paragraph`"),
    ],
)
def test_split_on_is_checked(name: str, split_on: str, words: str) -> None:
    fill(name)
    text = f"model: org/tiny\nmethod: lora\ndata: {{train: {{path: d, split_on: '{split_on}'}}}}\noutput_dir: runs/x\n"
    (problem,) = check(parse_recipe(text, "r.yaml").recipe)
    assert words in problem.message
    assert problem.loc == ("data", "train", "split_on")
