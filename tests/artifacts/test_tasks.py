"""Tasks of lm-evaluation-harness: the harness's numbers are the model's own, and whatever is wrong is told."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from experiments.test_compare import make_study
from typer.testing import CliRunner

from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.paired import difference
from ftune.artifacts.report import evaluation_table
from ftune.artifacts.task_scores import Score, compared
from ftune.artifacts.tasks import check_names, load_tasks
from ftune.artifacts.training import train
from ftune.artifacts.tuned import reading
from ftune.cli import app
from ftune.errors import FtuneError, RecipeError
from ftune.experiments.compare import compare
from ftune.experiments.markdown import markdown, summary
from ftune.experiments.page import page
from ftune.experiments.study import load_study
from ftune.methods import METHODS

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

DOCS = Path(__file__).parents[2] / "docs/compare.md"
COUNTRIES = ["France", "Japan", "Peru", "Kenya", "Norway", "Chile", "Iran", "Cuba"]


def task(where: Path, name: str = "capitals", rows: list[dict[str, Any]] | None = None, **changes: Any) -> str:
    """The task file that docs/compare.md shows, with more rows; returns its path."""
    (block,) = re.findall(r"```yaml\n(task: capitals\n.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    settings = {**yaml.safe_load(block), "task": name}
    settings["dataset_kwargs"] = {"data_files": {"test": f"{name}.jsonl", "train": f"{name}.jsonl"}}
    settings = {key: value for key, value in {**settings, **changes}.items() if value is not None}
    where.mkdir(exist_ok=True)
    if rows is None:
        rows = [
            {"country": c, "cities": [f"{c}ville", f"New {c}", "Rome"], "right": i % 3} for i, c in enumerate(COUNTRIES)
        ]
    (where / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (where / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return str(where / f"{name}.yaml")


GENERATION = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{cities[right]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def run_of(where: Path, method: str = "lora", **blocks: Any) -> Path:
    blocks.setdefault("training", {"max_steps": 4})
    train(tiny.recipe(where, method, **blocks))
    return where / "run"


def measured(run: Path, *names: str, **options: Any) -> dict[str, Any]:
    with reading(run) as target:
        return evaluate(target, base=False, tasks=load_tasks(names, **options))


def rows_of(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["task"], row["metric"]): row for row in result["tasks"]["rows"]}


@torch.no_grad()
def log_prob(model: torch.nn.Module, before: str, answer: str) -> float:
    """Of an answer behind a prompt: by the model alone, one text at a time."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer(before + answer, add_special_tokens=False, return_tensors="pt").input_ids
    start = len(tokenizer(before, add_special_tokens=False).input_ids)
    log_probs = tiny.logits(model, {"input_ids": ids})[0].log_softmax(-1)
    return float(log_probs[:-1].gather(1, ids[0, 1:, None])[start - 1 :].sum())


@pytest.mark.parametrize("method", ["lora", "prompt", "full"])
def test_scores_are_those_of_the_models(method: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, method, evaluation={"batch_size": 3})
    path = task(tmp_path / "tasks")
    result = measured(run, path)
    assert result["tasks"]["chat_template"]
    lines = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == list(range(len(COUNTRIES)))
    base = tiny.model().eval()
    right = []
    for line, row in zip(
        lines, map(json.loads, (tmp_path / "tasks/capitals.jsonl").read_text().splitlines()), strict=True
    ):
        prompt = f"<|im_start|>user\nThe capital of {row['country']} is<|im_end|>\n<|im_start|>assistant\n"
        assert line["prompt"] == prompt
        # The harness counts the white space that ends a prompt with the answer.
        found = [log_prob(base, prompt.rstrip(), f"\n{city}") for city in row["cities"]]
        assert [one[0] for one in line["base"]["answer"]] == pytest.approx(found, rel=1e-4)
        right.append(int(np.argmax(found)) == row["right"])
        assert line["base"]["scores"] == {"acc": float(right[-1])}
        tuned = [one[0] for one in line["tuned"]["answer"]]
        assert tuned != pytest.approx(found, rel=1e-3), "the tuned model is another"
    row = rows_of(result)["capitals", "acc"]
    assert row["n"] == len(COUNTRIES)
    assert row["base"] == pytest.approx(np.mean(right))
    kept = {key: value for key, value in result.items() if key not in ("predictions", "task_items")}
    assert json.loads((run / "eval.json").read_text()) == kept
    assert measured(run, path)["tasks"] == result["tasks"], "the models are what they were"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_answers_are_generated_by_every_method(method: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, method)
    result = measured(run, task(tmp_path / "tasks", **GENERATION), limit=3)
    row = rows_of(result)["capitals", "exact_match"]
    assert row["n"] == 3
    lines = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    assert all(isinstance(line[who]["answer"][0], str) for line in lines for who in ("base", "tuned"))


def test_the_difference_is_paired_by_item() -> None:
    base = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    tuned = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]

    def scores(of: list[float], **changes: Any) -> list[Score]:
        given: dict[str, Any] = {"items": of, "draws": None, "value": float(np.mean(of)), **changes}
        return [Score("t", "acc", n=8, lower_is_better=False, shown=True, shots=0, version="1", **given)]

    (row,) = compared({"base": scores(base), "tuned": scores(tuned)})
    expected = difference(np.array(tuned)[None] - np.array(base)[None])
    assert row["difference"] == pytest.approx([expected.d, expected.lo, expected.hi])
    assert row["share"]
    # Scores without bounds: the same interval, as much larger.
    (large,) = compared({"base": scores([40 * x for x in base]), "tuned": scores([40 * x for x in tuned])})
    assert large["difference"] == pytest.approx([40 * x for x in row["difference"]])
    assert not large["share"]
    draws = list(np.random.default_rng(1).normal(size=200))
    (drawn,) = compared(
        {
            "base": scores(base, items=None, draws=draws, value=3.0),
            "tuned": scores(base, items=None, draws=[x + 0.5 for x in draws], value=3.5),
        }
    )
    assert drawn["difference"] == pytest.approx([0.5, 0.5, 0.5]), "what both have in common is no error"


def test_a_perplexity_is_no_mean_and_lower_is_better(tmp_path: Path) -> None:
    changes = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_choice": None,
        "doc_to_target": "{{country}} and {{cities[0]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    run = run_of(tmp_path)
    result = measured(run, task(tmp_path / "tasks", **changes))
    row = rows_of(result)["capitals", "word_perplexity"]
    assert row["lower_is_better"]
    d, lo, hi = row["difference"]
    assert d == pytest.approx(row["tuned"] - row["base"])
    assert lo < d < hi
    base = tiny.model().eval()
    words = log = 0.0
    for c in COUNTRIES:
        text = f"{c} and {c}ville"
        words += 3
        log += log_prob(base, "<|im_start|>", text)
    assert row["base"] == pytest.approx(math.exp(-log / words), rel=1e-3)
    assert "lower is better: capitals bits_per_byte" in " ".join(evaluation_table(result, 80).split())


def test_a_group_and_its_parts(tmp_path: Path) -> None:
    where = tmp_path / "tasks"
    task(where, "one", dataset_kwargs={"data_files": {"test": str(where / "one.jsonl")}})
    task(where, "two", dataset_kwargs={"data_files": {"test": str(where / "two.jsonl")}})
    group = {
        "group": "both",
        "task": ["one", "two"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (where / "both.yaml").write_text(yaml.safe_dump(group))
    result = measured(run_of(tmp_path), str(where / "both.yaml"))
    rows = rows_of(result)
    assert rows["both", "acc"]["n"] == 2 * len(COUNTRIES)
    assert rows["both", "acc"]["base"] == pytest.approx((rows["one", "acc"]["base"] + rows["two", "acc"]["base"]) / 2)
    assert rows["both", "acc"]["difference"][1] is not None
    table = evaluation_table(result, 80)
    assert "\nboth " in table
    assert "\none " not in table, "a part is not what was asked for"


def test_solved_examples_are_the_same_for_both(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    path = task(tmp_path / "tasks", fewshot_split="train")
    measured(run, path, shots=2)
    prompts = [json.loads(line)["prompt"] for line in (run / "tasks.jsonl").read_text().splitlines()]
    assert all(prompt.count("The capital of") == 3 for prompt in prompts)
    # item_lines takes the base's prompt: it is the tuned model's, too, or the scores of a model differ from its own.
    with reading(run) as target:
        again = evaluate(target, base=False, tasks=load_tasks([path], shots=2))
    assert [row["base"] for row in again["tasks"]["rows"]] == [
        row["base"] for row in json.loads((run / "eval.json").read_text())["tasks"]["rows"]
    ]


def test_rows_that_are_texts_have_no_template(tmp_path: Path) -> None:
    tiny.recipe(tmp_path)
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "some words that are long enough"}\n' * 3)
    run = run_of(tmp_path)
    result = measured(run, task(tmp_path / "tasks"))
    assert not result["tasks"]["chat_template"]
    line = json.loads((run / "tasks.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == "The capital of France is"
    assert "without a chat template" in " ".join(evaluation_table(result, 80).split())


def test_a_run_that_held_nothing_out_can_do_tasks(tmp_path: Path) -> None:
    run = run_of(tmp_path, data={"eval": None})
    result = measured(run, task(tmp_path / "tasks"))
    assert "tuned" not in result
    assert evaluation_table(result | {"notes": []}, 80).startswith("task ")


def test_a_recipe_without_a_run_is_its_base(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(tiny.recipe(tmp_path).text)
    result = measured(tmp_path / "recipe.yaml", task(tmp_path / "tasks"))
    (row,) = result["tasks"]["rows"]
    assert "tuned" not in row
    assert "difference" not in evaluation_table(result, 80)


def test_long_prompts_lose_their_beginning_and_it_is_told(tmp_path: Path) -> None:
    rows = [{"country": "a" * (900 if i else 3), "cities": ["x", "y"], "right": 0} for i in range(4)]
    result = measured(run_of(tmp_path), task(tmp_path / "tasks", rows=rows))
    assert result["tasks"]["prompts_cut"] == 6
    assert "6 prompts lost their beginning" in evaluation_table(result, 120)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width: int, tmp_path: Path) -> None:
    path = task(tmp_path / "tasks", "capitals_of_countries_with_a_name_that_is_longer_than_any_that_the_harness_has")
    result = measured(run_of(tmp_path), path)
    lines = [line for line in evaluation_table(result, width).splitlines() if ".jsonl" not in line]
    assert max(map(len, lines)) <= width


# --- what a user does wrong ---


def wrong(where: Path, name: str) -> str:
    """A name for ``--tasks`` with something wrong."""
    where.mkdir(exist_ok=True)
    text = {"list.yaml": "- a\n", "broken.yaml": "task: [\n", "recipe.yaml": "model: x\nmethod: lora\n"}.get(name)
    if text is not None:
        (where / name).write_text(text)
        return str(where / name)
    bad: dict[str, dict[str, Any]] = {
        "no split": {"test_split": None},
        "other split": {"test_split": "tests"},
        "no rows": {"rows": []},
        "no data": {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
        "metric": {"metric_list": [{"metric": "accuracyy", "aggregation": "mean", "higher_is_better": True}]},
        "template": {"doc_to_text": "{{country"},
        "field": {"doc_to_text": "{{name.first}}"},
        "output": {"output_type": "choices"},
        "code": {"unsafe_code": True},
    }
    return task(where, name.replace(" ", "_"), **bad[name])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("list.yaml", "is no task"),
        ("broken.yaml", "broken.yaml:2 is not YAML"),
        ("recipe.yaml", "is a recipe of ftune"),
        ("no split", "neither a `test_split`"),
        ("other split", "no split or column 'tests'"),
        ("no rows", "have no items"),
        ("no data", "tasks/nowhere.jsonl"),
        ("metric", "accuracyy"),
        ("template", "Template"),
        ("field", "UndefinedError"),
        ("output", "choices"),
        ("code", "runs code that the model writes"),
    ],
)
def test_a_task_that_cannot_work_is_refused(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(FtuneError) as error:
        load_tasks([wrong(tmp_path / "tasks", name)])
    assert said in error.value.render()
    assert "\n  File " not in error.value.render()


def test_near_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(FtuneError, match="knows no task `helaswag`") as error:
        load_tasks(["helaswag"])
    assert "`hellaswag`" in str(error.value.help)
    task(tmp_path)
    with pytest.raises(FtuneError, match="no task file") as error:
        load_tasks([str(tmp_path / "capitls.yaml")])
    assert "capitals.yaml" in str(error.value.help)


def test_more_examples_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(FtuneError, match="fewer solved examples than --shots asks for"):
        load_tasks([task(tmp_path, fewshot_split="train")], shots=50)


def test_data_that_only_the_network_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FtuneError, match="not on this machine and cannot be had"):
        load_tasks([task(tmp_path, dataset_path="Rowan/hellaswag", dataset_kwargs=None)])


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftune.artifacts.tasks.version_of", lambda name: None)
    with pytest.raises(FtuneError) as error:
        check_names(["hellaswag"])
    assert error.value.help == "pip install 'ftune[eval]'"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", ""], "no task is named"),
        (["--tasks", "a,,b"], "no task is named"),
        (["--tasks", "a,a"], "named twice"),
        (["--limit", "3"], "--limit is of --tasks"),
        (["--shots", "3"], "--shots is of --tasks"),
        (["--tasks", "hellaswag", "--limit", "0"], "--limit"),
    ],
)
def test_options_that_do_not_fit(options: list[str], said: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["eval", str(tmp_path), *options])
    assert found.exit_code != 0
    assert said in f"{found.output}{found.exception}"


def test_the_command_line(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    found = CliRunner().invoke(app, ["eval", str(run), "--tasks", task(tmp_path / "tasks"), "--limit", "4", "--json"])
    assert found.exit_code == 0
    (row,) = json.loads(found.stdout)["tasks"]["rows"]
    assert row["n"] == 4


# --- in a study ---


def test_a_study_names_tasks_that_are_there(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("recipe: r.yaml\ntasks: [./nowhere.yaml]\n")
    with pytest.raises(RecipeError) as error:
        load_study(study)
    assert "study.yaml:2" in error.value.render()
    assert "there is no task file ./nowhere.yaml" in error.value.render()


@pytest.mark.slow
def test_a_study_runs_tasks_on_the_base_and_on_one_run_of_each_method(tmp_path: Path) -> None:
    path = task(tmp_path / "tasks")
    loaded = load_study(make_study(tmp_path, seeds=1, tasks=[path]))
    result = compare(loaded)
    assert result is not None
    for method in result["methods"]:
        (row,) = method["tasks"]
        assert row["task"] == "capitals"
        run = tmp_path / "study" / method["runs"][0]["run"]
        assert rows_of(measured(run, path))["capitals", "acc"] == row, "a study's run is an ordinary one"
    assert json.loads((tmp_path / "study/compare.json").read_text())["methods"] == result["methods"]
    text = markdown(result, "ftune compare")
    assert "## Tasks of lm-evaluation-harness" in text
    assert "| capitals |" in text.split("## Details")[0], "a column of the first table"
    shown = [
        line for line in summary(result, "study", 80).splitlines() if line.startswith("ia3 ") and "capitals" in line
    ]
    assert len(shown) == 1
    assert "capitals" in page(result, tmp_path / "study", "ftune compare")
    # The task is edited, and one method measured again: other items are not paired with the base's.
    second = Path("tests", *Path(result["methods"][1]["runs"][0]["run"]).parts[1:])
    edited = [{"country": c, "cities": ["Rome", f"{c}town"], "right": i % 2} for i, c in enumerate(COUNTRIES[:6])]
    task(tmp_path / "tasks", rows=edited)
    root = tmp_path / "study"
    (root / second / "tasks.json").unlink()
    other = compare(loaded)
    assert other is not None
    assert other["methods"][0]["tasks"] == result["methods"][0]["tasks"]
    assert other["methods"][1]["tasks"] == []
    (why,) = other["methods"][1]["failures"]
    assert "are not those that the base was measured on" in why
    # As it says: without these two files all are measured on the new items.
    for path in re.findall(r"/\S+\.(?:json|failed)", why):
        Path(path).unlink()
    other = compare(loaded)
    assert other is not None
    assert [method["tasks"][0]["n"] for method in other["methods"]] == [6, 6]
    # Another task, of which the base fails: the rest of the study stands.
    bad = task(tmp_path / "tasks", "bad", rows=[{"country": "x", "cities": c, "right": 0} for c in (["a", "b"], None)])
    make_study(tmp_path, seeds=1, tasks=[bad])
    again = compare(load_study(tmp_path / "study.yaml"))
    assert again is not None
    assert "failed at an item" in again["tasks_failed"]
    assert all(method["tasks"] == [] and method["score"] is not None for method in again["methods"])
