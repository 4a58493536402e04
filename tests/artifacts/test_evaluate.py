"""Evaluation: the base beside the tuned model, and metrics of greedy answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.generate import greedy
from ftune.artifacts.report import evaluation_table
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target, reading
from ftune.cli import app
from ftune.errors import DataError, RunDirError
from ftune.methods import METHODS
from ftune.run.lock import RunLock


@pytest.mark.parametrize("name", METHODS)
def test_base_and_tuned_side_by_side(name: str, tmp_path: Path) -> None:
    metrics = {"metrics": ["exact_match", "contains"], "max_new_tokens": 8}
    loaded = tiny.recipe(tmp_path, name, evaluation=metrics, training={"max_steps": 20})
    (tmp_path / "recipe.yaml").write_text(loaded.text)
    before = evaluate(find_target(tmp_path / "recipe.yaml"), base=False)
    assert "tuned" not in before, "there is no run yet"
    train(loaded)
    result = evaluate(find_target(tmp_path / "run"), base=True)
    assert result["base"]["loss"] == pytest.approx(before["base"]["loss"], rel=1e-6)
    assert result["base"]["metrics"] == before["base"]["metrics"]
    assert result["tuned"]["loss"] < 0.9 * result["base"]["loss"]
    # What training measured last is what evaluation measures on the saved model.
    assert result["tuned"]["loss"] == pytest.approx(tiny.events(tmp_path / "run", "eval")[-1]["loss"], rel=1e-5)
    assert result["tuned"]["perplexity"] == pytest.approx(math.exp(result["tuned"]["loss"]))
    kept = {key: value for key, value in result.items() if key != "predictions"}  # where they are, not what they are
    assert json.loads((tmp_path / "run/eval.json").read_text()) == kept
    table = evaluation_table(result, 80)
    # A path is not broken.
    assert max(len(line) for line in table.splitlines() if not line.endswith("predictions.jsonl")) <= 80
    assert "change" in table.splitlines()[0]


def test_a_recipe_that_changed_since_is_not_its_run(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, evaluation={"metrics": ["contains"], "max_new_tokens": 4})
    train(tiny.recipe(tmp_path))
    path = tmp_path / "recipe.yaml"
    path.write_text(loaded.text)
    # How to evaluate may change after training; what was trained may not.
    assert set(evaluate(find_target(path), base=False)["tuned"]["metrics"]) == {"contains"}
    path.write_text(tiny.recipe(tmp_path, method={"rank": 8}).text)
    with pytest.raises(RunDirError, match="another `method`"):
        find_target(path)


def test_rows_that_were_trained_on_are_not_held_out(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, data={"eval": None, "eval_fraction": 0.25}))
    tiny.write_chats(tmp_path / "train.jsonl", 27)
    with pytest.raises(DataError, match="were trained on"):
        evaluate(find_target(tmp_path / "run"), base=False)


def test_held_out_data_of_its_own_may_change_and_is_mentioned(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path))
    tiny.write_chats(tmp_path / "eval.jsonl", 5, start=50)
    result = evaluate(find_target(tmp_path / "run"), base=False)
    assert "differs from that of the run" in evaluation_table(result, 80)


def test_two_patterns_are_two_metrics(tmp_path: Path) -> None:
    metrics = [{"name": "regex", "pattern": p} for p in ("(It)", "(\\d)")]
    train(tiny.recipe(tmp_path, evaluation={"metrics": metrics, "max_new_tokens": 4}))
    found = evaluate(find_target(tmp_path / "run"), base=False)["tuned"]["metrics"]
    assert set(found) == {"regex (It)", "regex (\\d)"}


def test_text_has_no_answers_to_compare(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, evaluation={"metrics": ["contains"]})
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "some words that are long enough"}\n' * 3)
    with pytest.raises(DataError, match="format `text`"):
        train(loaded)


def test_without_held_out_data_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, data={"eval": None})
    (tmp_path / "recipe.yaml").write_text(loaded.text)
    with pytest.raises(DataError, match="holds no data out"):
        evaluate(find_target(tmp_path / "recipe.yaml"), base=False)


def test_neither_run_nor_recipe(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="does not exist"):
        find_target(tmp_path / "nothing")
    with pytest.raises(RunDirError, match="no run directory"):
        find_target(tmp_path)


def test_greedy_in_batches_equals_one_by_one() -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("a", "longer prompt", "mid one", "z" * 30)]

    def answers(size: int) -> list[str]:
        found = greedy(model, tokenizer, prompts, dtype=torch.float32, batch_size=size, max_new_tokens=6)
        return [answer.text for answer in found]

    alone = answers(1)
    assert answers(3) == alone
    assert answers(4) == alone
    for prompt, answer in zip(prompts, alone, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                following = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if following == tokenizer.eos_token_id:
                break
            ids.append(following)
        assert answer == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_a_run_that_is_written_is_not_read(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path))
    (tmp_path / "recipe.yaml").write_text(tiny.recipe(tmp_path).text)
    for target in (tmp_path / "run", tmp_path / "recipe.yaml"):
        with RunLock(tmp_path / "run"):
            for command in (["eval"], ["chat", "--prompt", "hello"]):
                result = CliRunner().invoke(app, [*command, str(target)])
                assert isinstance(result.exception, RunDirError)
                assert "is in use by another process: pid" in result.exception.message
        # and for as long as it is read it is not written
        with reading(target), pytest.raises(RunDirError, match="in use"), RunLock(tmp_path / "run"):
            pass
        with reading(target), reading(target) as found:
            assert found.run is not None
