"""Predictions of an evaluation, of new rows, and of a checkpoint; chat with the same prompts."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

from ftune.artifacts.chat import Chat
from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.report import evaluation_table
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target, reading
from ftune.cli import app
from ftune.errors import DataError, FtuneError, RunDirError
from ftune.run.lock import RunLock

WANTED = {"metrics": ["exact_match", "f1"], "max_new_tokens": 8}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(run: Path, **settings: Any) -> Chat:
    settings = {"max_new_tokens": 8, "temperature": 0.0, "base": False} | settings
    return Chat(find_target(run), **settings)


def test_every_answer_is_kept_predicted_again_and_chatted(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, evaluation=WANTED, training={"max_steps": 12}))
    run = tmp_path / "run"
    result = evaluate(find_target(run), base=True)
    kept = lines(run / "predictions.jsonl")
    assert [line["row"] for line in kept] == list(range(6))
    assert kept[1]["reference"] == "Hi there! 1"
    assert kept[1]["prompt"].endswith("<|im_start|>assistant\n")
    for who in ("base", "tuned"):
        mean = sum(line[who]["scores"]["f1"] for line in kept) / len(kept)
        assert mean == pytest.approx(result[who]["metrics"]["f1"])
    answers = [line["tuned"]["answer"] for line in kept]
    assert len({line["base"]["answer"] for line in kept} | set(answers)) > 2

    questions = [json.loads(line)["messages"][0] for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    new = write(tmp_path / "new.jsonl", *({"messages": [question], "id": i} for i, question in enumerate(questions)))
    out = tmp_path / "answers.jsonl"
    done = CliRunner().invoke(app, ["predict", str(run), str(new), "--output", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"6 rows answered: {out}\n"
    assert [(line["id"], line["answer"]) for line in lines(out)] == list(enumerate(answers))
    # rows with answers are predicted as well
    again = CliRunner().invoke(app, ["predict", str(run), str(tmp_path / "eval.jsonl")])
    assert [json.loads(line)["answer"] for line in again.stdout.splitlines()] == answers
    for question, answer in zip(questions[:3], answers[:3], strict=True):
        written = io.StringIO()
        assert talk(run).answer(question["content"], written) == answer
        assert written.getvalue().strip() == answer
        assert written.getvalue().endswith("\n")


def test_raw_prompts_stay_raw(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i} is", "completion": f" {i % 3}."} for i in range(8)]
    data = str(write(tmp_path / "rows.jsonl", *rows))
    train(tiny.recipe(tmp_path, data={"train": data, "eval": data}, evaluation=WANTED))
    run = tmp_path / "run"
    evaluate(find_target(run), base=False)
    kept = lines(run / "predictions.jsonl")
    assert kept[3]["prompt"] == "Q3 is"
    chat = talk(run)
    assert "whole prompt" in chat.manner
    assert [chat.answer(row["prompt"], io.StringIO()) for row in rows[:4]] == [
        line["tuned"]["answer"] for line in kept[:4]
    ], "and each prompt stands by itself"
    new = write(tmp_path / "new.jsonl", {"prompt": "Q3 is"})
    done = CliRunner().invoke(app, ["predict", str(run), str(new)])
    assert json.loads(done.stdout)["answer"] == kept[3]["tuned"]["answer"]
    with pytest.raises(FtuneError, match="no system message"):
        talk(run, system="Be brief.")
    with pytest.raises(FtuneError, match="an empty prompt"):
        chat.answer("", io.StringIO())


def test_columns_of_the_run_are_those_of_new_rows(tmp_path: Path) -> None:
    rows = "ticket,team\n" + "".join(f"printer {i},{'AB'[i % 2]}\n" for i in range(8))
    (tmp_path / "rows.csv").write_text(rows)
    columns = {"prompt": "Ticket: {ticket} Team:", "completion": " {team}"}
    source = {"path": str(tmp_path / "rows.csv"), "columns": columns}
    train(tiny.recipe(tmp_path, data={"train": source, "eval": None, "eval_fraction": 0.25}, evaluation=WANTED))
    run = tmp_path / "run"
    evaluate(find_target(run), base=False)
    kept = lines(run / "predictions.jsonl")
    number = kept[0]["row"]
    assert kept[0]["prompt"] == f"Ticket: printer {number} Team:"
    (tmp_path / "new.csv").write_text(f"ticket\nprinter {number}\n")
    done = CliRunner().invoke(app, ["predict", str(run), str(tmp_path / "new.csv")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"row": 0, "answer": kept[0]["tuned"]["answer"], "ticket": f"printer {number}"}
    chat = talk(run)
    assert chat.manner == "your text is set into the recipe's prompt: Ticket: ... Team:"
    assert chat.answer(f"printer {number}", io.StringIO()) == kept[0]["tuned"]["answer"]
    (tmp_path / "other.csv").write_text("tickte\nx\n")
    done = CliRunner().invoke(app, ["predict", str(run), str(tmp_path / "other.csv")])
    assert isinstance(done.exception, DataError)
    assert "ticket" in str(done.exception.message if hasattr(done.exception, "message") else done.exception)


def test_texts_are_continued(tmp_path: Path) -> None:
    data = str(write(tmp_path / "rows.jsonl", *({"text": f"some words {i} that go on"} for i in range(6))))
    train(tiny.recipe(tmp_path, data={"train": data, "eval": None}))
    new = write(tmp_path / "new.jsonl", {"text": "some words 3"})
    done = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), str(new), "--max-new-tokens", "4"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["answer"] == talk(tmp_path / "run", max_new_tokens=4).answer(
        "some words 3", io.StringIO()
    )


@pytest.mark.parametrize("method", ["lora", "full", "adalora"])
def test_a_checkpoint_is_measured_as_the_run_that_ended_there(method: str, tmp_path: Path) -> None:
    loaded = tiny.recipe(
        tmp_path, method, evaluation=WANTED, training={"max_steps": 6}, checkpoint={"every_steps": 2, "keep": 3}
    )
    train(loaded)
    run = tmp_path / "run"
    ended = evaluate(find_target(run), base=False)
    with RunLock(run), reading(run, "step-6") as found:  # also while the run is written
        last = evaluate(found, base=False)
    assert last["tuned"]["loss"] == pytest.approx(ended["tuned"]["loss"], rel=1e-5)
    assert last["checkpoint"] == "step-6"
    earlier = evaluate(find_target(run, "step-2"), base=True)
    assert earlier["tuned"]["loss"] > ended["tuned"]["loss"]
    assert "this is the checkpoint step-2" in evaluation_table(earlier, 80)
    assert json.loads((run / "eval.json").read_text())["checkpoint"] is None
    assert lines(run / "evaluations/step-2/predictions.jsonl")
    with pytest.raises(RunDirError, match="no checkpoint step-3"):
        find_target(run, "step-3")
    with pytest.raises(RunDirError, match="no checkpoint"):
        find_target(run, "../../etc")
    (run / "checkpoints/step-2/trained.safetensors").write_bytes(b"x")
    with pytest.raises(RunDirError, match="step-2 of .* is damaged"):
        find_target(run, "step-2")


def test_a_run_that_has_not_ended_is_measured_at_its_newest_checkpoint(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, training={"max_steps": 4}, checkpoint={"every_steps": 2})
    train(loaded)
    os.rename(tmp_path / "run/adapter", tmp_path / "adapter")
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "the run has not ended: this is its newest checkpoint, step-4" in " ".join(done.stdout.split())


def test_a_result_that_cannot_be_written_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny.recipe(tmp_path, evaluation=WANTED))

    def full(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ftune.artifacts.evaluate.write_json", full)
    monkeypatch.setattr("ftune.artifacts.predict.write_output", full)
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "run")])
    assert done.exit_code == 0
    assert "held-out loss" in done.stdout
    assert "could not be kept" in done.stdout
    done = CliRunner().invoke(
        app, ["predict", str(tmp_path / "run"), str(tmp_path / "eval.jsonl"), "-o", str(tmp_path / "x.jsonl")]
    )
    assert isinstance(done.exception, FtuneError)
    assert len(done.stdout.splitlines()) == 6


def test_no_input_is_replaced_by_what_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = tiny.recipe(tmp_path)
    train(loaded)
    Path("recipe.yaml").write_text(loaded.text)
    write(tmp_path / "new.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output in (
        *("new.jsonl", "train.jsonl", "eval.jsonl", "recipe.yaml", "base/config.json", "run/run.json"),
        *("run/adapter/x.jsonl", "run/.tmp-x", "run"),
    ):
        done = CliRunner().invoke(app, ["predict", "recipe.yaml", "new.jsonl", "-o", output])
        assert isinstance(done.exception, FtuneError), output
        assert output in str(done.exception)
    for out in ("base", ".", "run/adapter/x", "run/checkpoints/step-9", "run/lora"):
        done = CliRunner().invoke(app, ["merge", "run", "--out", out])
        assert isinstance(done.exception, FtuneError), out
    os.mkfifo("pipe")
    done = CliRunner().invoke(app, ["predict", "run", "new.jsonl", "-o", "pipe"])
    assert "nobody reads the pipe; the answers were printed instead" in str(done.exception)
    assert json.loads(done.stdout)["row"] == 0
    done = CliRunner().invoke(app, ["predict", "run", "new.jsonl", "-o", os.devnull])
    assert (done.exit_code, done.stdout) == (0, "")
    done = CliRunner().invoke(app, ["predict", "run", "new.jsonl", "-o", "-"])
    assert json.loads(done.stdout)["row"] == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_directory_s_rows_that_are_not_answered_are_told(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path))
    (tmp_path / "new").mkdir()
    for name in ("a", "test"):
        write(tmp_path / "new" / f"{name}.jsonl", {"messages": [{"role": "user", "content": name}]})
    done = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), str(tmp_path / "new")])
    assert "a.jsonl (not named for a split, as test.jsonl is)" in done.stderr


def test_the_rows_of_loss_and_metrics_are_said(tmp_path: Path) -> None:
    wanted = {**WANTED, "max_examples": 2}
    train(tiny.recipe(tmp_path, evaluation=wanted))
    table = evaluation_table(evaluate(find_target(tmp_path / "run"), base=False), 80)
    assert "loss on 6 held-out rows, metrics on 2 of them" in table
    assert max(len(line) for line in table.splitlines() if str(tmp_path) not in line) <= 80


def test_what_a_model_writes_gives_no_orders_to_a_terminal(tmp_path: Path) -> None:
    result = {
        "tuned": {"loss": 1.0, "perplexity": 2.7, "metrics": {"f1": 0.5}},
        "samples": [{"reference": "首都" * 40, "tuned": "\x1b[2J\x07" + "x" * 200}],
        "notes": [],
        "examples": 1,
        "generated": 1,
        "prompts_too_long": 0,
    }
    table = evaluation_table(result, 60)
    assert "\x1b" not in table
    assert "\x07" not in table
    assert all(len(line) + sum(c in "首都" for c in line) <= 60 for line in table.splitlines())
