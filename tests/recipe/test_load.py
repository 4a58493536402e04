"""YAML 1.2, short forms, overrides and positions."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ftune.errors import RecipeError
from ftune.recipe import load_recipe, parse_recipe
from ftune.recipe.load import MAX_BYTES, Loaded, is_plain_string

SHORT = "model: org/tiny\nmethod: lora\ndata: data/train.jsonl\noutput_dir: runs/x\n"


def load(extra: str = "", *overrides: str) -> Loaded:
    return parse_recipe(SHORT + extra, "r.yaml", overrides)


def refused(extra: str = "", *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(extra, *overrides)
    return caught.value.render()


def test_short_forms_are_written_out() -> None:
    loaded = load("evaluation: {metrics: [exact_match]}\n")
    assert loaded.raw["data"] == {"train": {"path": "data/train.jsonl"}}
    assert loaded.raw["evaluation"]["metrics"] == [{"name": "exact_match"}]
    assert loaded.recipe.method.name == "lora"
    assert loaded.text.startswith(SHORT)


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "0.0002", ".0002", "2.e-4", "+2e-4"])
def test_floats_of_yaml_1_2(text: str) -> None:
    assert load(f"optimizer: {{learning_rate: {text}}}\n").recipe.optimizer.learning_rate == 2e-4


@pytest.mark.parametrize(("text", "value"), [("10", 10), ("0o10", 8), ("0x10", 16), ("010", 10), ("+5", 5)])
def test_integers_of_yaml_1_2(text: str, value: int) -> None:
    assert load(f"training: {{seed: {text}}}\n").recipe.training.seed == value


@pytest.mark.parametrize("text", ["no", "on", "yes", "off", "1:30", "1_000", "0b1", "2001-01-01"])
def test_what_yaml_1_1_converts_is_a_string(text: str) -> None:
    loaded = parse_recipe(SHORT.replace("runs/x", text), "r.yaml")
    assert loaded.recipe.output_dir == text


@pytest.mark.parametrize("text", ["~", "null", "Null", "NULL", ""])
def test_null(text: str) -> None:
    assert load(f"training: {{max_grad_norm: {text}}}\n").recipe.training.max_grad_norm is None


def test_an_empty_block_is_the_block_of_defaults() -> None:
    assert load("training:\noptimizer:\nschedule:\ncheckpoint:\nevaluation:\n").recipe == load().recipe


def test_anchors_and_merge_keys() -> None:
    recipe = load("checkpoint: &c {every_steps: 5}\nevaluation: {<<: [*c, {batch_size: 3}], batch_size: 2}\n").recipe
    assert recipe.evaluation.every_steps == 5
    assert recipe.evaluation.batch_size == 2


def test_positions_of_keys_and_values() -> None:
    positions = load("training:\n  seed: 3\n").positions
    seed = positions.at["training", "seed"]
    assert (seed.key.line, seed.key.column, seed.key.length) == (5, 2, 4)
    assert (seed.value.line, seed.value.column, seed.value.length) == (5, 8, 1)
    name = positions.at["method", "name"].value
    assert (name.line, name.column, name.length) == (1, 8, 4)


def test_crlf_and_bom(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SHORT.replace("\n", "\r\n").encode())
    assert load_recipe(path).recipe == load().recipe


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.max_steps=20", lambda r: r.training.max_steps == 20),
        ("method.rank=8", lambda r: r.method.rank == 8),
        ("method=full", lambda r: r.method.name == "full"),
        ("method={name: dora, rank: 2}", lambda r: r.method.rank == 2),
        ("data.eval.path=data/eval.jsonl", lambda r: r.data.eval.path == "data/eval.jsonl"),
        ("data.eval=data/eval.jsonl", lambda r: r.data.eval.path == "data/eval.jsonl"),
        ("data.train.format=text", lambda r: r.data.train.format == "text"),
        ("data=other.jsonl", lambda r: r.data.train.path == "other.jsonl"),
        ("optimizer.learning_rate=2e-4", lambda r: r.optimizer.learning_rate == 2e-4),
        ("tracking=[jsonl]", lambda r: r.tracking == ("jsonl",)),
        ("evaluation.metrics=[contains]", lambda r: r.evaluation.metrics[0].name == "contains"),
        ("training.max_grad_norm=null", lambda r: r.training.max_grad_norm is None),
        ("model.id=package://a/b.gguf", lambda r: r.model.id == "package://a/b.gguf"),
        ("output_dir=a=b", lambda r: r.output_dir == "a=b"),
    ],
)
def test_override(override: str, read: object) -> None:
    loaded = load("", override)
    assert callable(read)
    assert read(loaded.recipe)
    assert loaded.text == SHORT


def test_overrides_reach_into_lists_and_apply_in_order() -> None:
    extra = "evaluation: {metrics: [exact_match]}\ntracking: [jsonl]\n"
    recipe = load(
        extra,
        "evaluation.metrics.0.name=contains",
        "evaluation.metrics.1=exact_match",
        "tracking.1=progress",
        "training.seed=1",
        "training.seed=2",
    ).recipe
    assert [metric.name for metric in recipe.evaluation.metrics] == ["contains", "exact_match"]
    assert recipe.tracking == ("jsonl", "progress")
    assert recipe.training.seed == 2


def test_an_override_mends_the_recipe() -> None:
    assert load("training: {seed: x}\n", "training.seed=1").recipe.training.seed == 1


def test_the_error_is_shown_where_the_last_value_stands() -> None:
    report = refused("training:\n  seed: 1\n", "training={seed: x}")
    assert "--set training={seed: x}" in report
    assert "r.yaml" not in report
    assert "r.yaml:6:3" in refused("training:\n  sed: 1\n", "training.seed=1")


def test_trust_cannot_come_through_an_alias_either() -> None:
    assert "cannot be set" in refused("", "model={id: x, <<: {trust_remote_code: true}}")


@pytest.mark.parametrize("bad", ["model.trust_remote_code=false", "model.trust_remote_code=", "model=x"])
def test_trust_is_not_set_or_moved_from_the_command_line(bad: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(SHORT.replace("org/tiny", "{id: org/tiny, trust_remote_code: true}"), "r", [bad])


def test_every_mistake_is_reported_in_the_order_of_the_file() -> None:
    with pytest.raises(RecipeError) as caught:
        load("training: {seed: x, sed: 1}\nschedule: {nme: 1}\n", "method.rank=x")
    assert [report.splitlines()[1].strip() for report in caught.value.reports] == [
        "--> r.yaml:5:18",
        "--> r.yaml:5:21",
        "--> r.yaml:6:12",
        "--> command line",
    ]


def test_many_mistakes_are_counted() -> None:
    with pytest.raises(RecipeError) as caught:
        load("".join(f"key_{i}: 1\n" for i in range(60)))
    assert len(caught.value.reports) == 51
    assert caught.value.reports[-1] == "error: 10 more mistakes are not shown"


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)),
        "x: " + "[" * 3000,
        "x: " + "{a: " * 3000,
        "? " * 3000,
        "- " * 3000,
        "x: [" + "a," * 40_000,
        "".join(f"unknown_key_{i}: 1\n" for i in range(2400)),
        "x: {" + ",".join(f"k{i}: 1" for i in range(2400)) + "}",
        "x: '" + "\u4f59" * 30_000 + "'",
    ],
    ids=["bomb", "merge_bomb", "lists", "maps", "keys", "dashes", "long", "unknown", "line", "wide"],
)
def test_hostile_text_is_refused_in_bounded_time(text: str) -> None:
    begin = time.process_time()
    with pytest.raises(RecipeError):
        parse_recipe(text, "r.yaml")
    assert time.process_time() - begin < 3  # each takes a fraction of a second; unbounded ones take hours


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    for name, words in [
        ("recpie.yaml", "did you mean"),
        ("nowhere/r.yaml", "does not exist"),
        (".", "is a directory"),
    ]:
        with pytest.raises(RecipeError, match=words):
            load_recipe(tmp_path / name)
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(tmp_path / "large.yaml")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a", True),
        ("a/b.c", True),
        ("no", True),
        ("null", False),
        ("1", False),
        ("a: b", False),
        ("", False),
        ("a,b", False),
    ],
)
def test_plain_strings(text: str, plain: bool) -> None:
    assert is_plain_string(text) is plain
