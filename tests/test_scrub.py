"""Secrets are found and masked, column by column, and ordinary text stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import ftune.scrub as scrub_module
from ftune.artifacts.run_dir import RunDir
from ftune.errors import FtuneError, RecipeError
from ftune.recipe import load_checked
from ftune.run.events import Saved
from ftune.run.sinks.jsonl import JsonlSink
from ftune.scrub import find_secret, scrub, scrub_data

SECRET = "s3cr3t-value-of-a-token-" + "x" * 40


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_SECRETS", "DB_PASSWORD"])
def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text = f"in front {SECRET} behind"
    assert scrub(text) == text
    monkeypatch.setenv(name, SECRET)
    assert scrub(text) == f"in front {'*' * len(SECRET)} behind"
    assert name in (find_secret(text) or "")


@pytest.mark.parametrize(
    ("name", "value"), [("HF_TOKEN", "short"), ("SSH_KEY", __file__), ("SSH_KEYS", "/usr/bin"), ("MONKEYS", SECRET)]
)
def test_what_is_no_secret(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert scrub(f"a {value} b") == f"a {value} b"


@pytest.mark.parametrize(
    "value", ["/9j4AAQSkZJRgABAQAAAQ", "~tilde-and-more", "/", "~nobody-of-that-name/x", "/" + "x" * 5000, "/a//b==\n"]
)
def test_a_secret_may_begin_as_a_path_does(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", value)
    masked = scrub(f"a {value} b")
    assert masked == (f"a {value} b" if len(value) < 8 else f"a {'*' * len(value)} b")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://me:hunter22@host.org/x", "me:hunter22"),
        ("ssh://tok123@host/x", "tok123"),
        ("http://host/x?a=1&access_token=abc123&b=2", "abc123"),
        ("http://host/x?X-Amz-Signature=abc123#f", "abc123"),
        ("http://host/x?sig=abc123", "abc123"),
        ("hf_" + "Ab1" * 10, "hf_" + "Ab1" * 10),
        ("ghp_" + "Ab1" * 10, "ghp_" + "Ab1" * 10),
    ],
)
def test_forms(text: str, secret: str) -> None:
    masked = scrub(f"see {text}, please")
    assert masked == f"see {text.replace(secret, '*' * len(secret))}, please"
    assert find_secret(text)
    assert scrub(masked) == masked


@pytest.mark.parametrize(
    "text", ["https://host.org/x?split=train&page=2", "a@b.org", "pattern: key=(.*)", "hf_x", "x?token"]
)
def test_ordinary_text_stays(text: str) -> None:
    assert scrub(text) == text
    assert find_secret(text) is None


def test_data_of_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "12345678")
    assert scrub_data({"a": [("12345678", 12345678)], "12345678": None}) == {
        "a": [["********", 12345678]],
        "********": None,
    }


RECIPE = "model: org/tiny\nmethod: lora\ndata: {train: rows.jsonl%s}\noutput_dir: runs/x\n"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (RECIPE % f", split: {SECRET}", []),
        (RECIPE.replace("org/tiny", f"https://me:{SECRET}@host/x") % "", []),
        (RECIPE % f", nonsense: {SECRET}", []),
        (RECIPE % f", {SECRET}: 1", []),
        (RECIPE % "", [f"training.max_steps={SECRET}"]),
        (RECIPE % "", [f"output_dir={SECRET}/x"]),
        (RECIPE % "", [f"model.dtype={SECRET}"]),
    ],
)
def test_no_message_about_a_recipe_shows_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("COLUMNS", "60")  # source lines are cut: half of a token is a secret too
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    Path("r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_checked(Path("r.yaml"), options)
    report = caught.value.render()
    assert "s3cr" not in report
    assert "xxxxx" not in report
    assert report.startswith("error: ")


def test_a_secret_in_a_field_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    Path("r.yaml").write_text(RECIPE % "" + f"evaluation: {{metrics: [{{name: regex, pattern: 'x {SECRET}'}}]}}\n")
    monkeypatch.setenv("X_SECRET", SECRET)
    with pytest.raises(RecipeError, match="X_SECRET"):
        load_checked(Path("r.yaml"), ["data.eval_fraction=0.5"])


def test_files_of_a_run_keep_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    run = RunDir(tmp_path)
    run.write({"recipe": f"# {SECRET}\nmodel: x # https://me:{SECRET}@host\n", "error": SECRET, "overrides": [SECRET]})
    sink = JsonlSink(run.metrics)
    sink.receive(Saved(1, f"/x/{SECRET}"))
    sink.close()
    for file in (run.record_path, run.metrics):
        text = file.read_text()
        assert "s3cr" not in text
        assert "****" in text
        json.loads(text)


def test_the_model_card_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftune.artifacts.card import write_card

    monkeypatch.setenv("HF_TOKEN", SECRET)
    record = {
        "plan": {
            "model": {"public_name": f"org/{SECRET}", "dtype": "float32"},
            "method": {"name": "lora", "saved_as": "peft", "settings": {"x": SECRET}, "trainable": 1, "share": 0.1},
            "data": {"examples": 1, "tokens": 1, "target_tokens": 1},
            "training": {
                "steps": 1,
                "global_batch": 1,
                "epochs": 1,
                "learning_rate": 1,
                "schedule": "x",
                "optimizer": "y",
            },
        },
        "measured": {},
        "resolved": {"data": {"train": {"path": f"https://me:{SECRET}@host/x"}}},
        "seed": 7,
        "device": {"name": "cpu"},
        "versions": {"ftune": "1"},
    }
    write_card(tmp_path, record)
    card = (tmp_path / "README.md").read_text()
    assert "s3cr" not in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["ftune", "lora"]


def test_errors_show_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert "s3cr" not in FtuneError(f"no {SECRET}", help=f"use {SECRET}").render()


def test_the_environment_is_searched_once_for_all_strings_of_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[dict[str, str]] = []
    real = scrub_module._values
    monkeypatch.setattr(scrub_module, "_values", lambda: searches.append(real()) or searches[-1])
    monkeypatch.setenv("A_TOKEN", "swordfish-1")
    data = {"a": ["swordfish-1", {"swordfish-1": ("b", "c")}], "d": 1.0}
    assert scrub_data(data) == {"a": ["*" * 11, {"*" * 11: ["b", "c"]}], "d": 1.0}
    assert len(searches) == 1
    monkeypatch.setenv("A_TOKEN", "swordfish-2")  # and anew for the next: it may have changed
    assert scrub_data("swordfish-2") == "*" * 11
