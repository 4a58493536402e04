"""The examples of docs/python.md run, in order, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny

import ftune

PAGE = (Path(__file__).parents[2] / "docs/python.md").read_text(encoding="utf-8")
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.model_dir(tmp_path / "base")
    tiny.write_chats(tmp_path / "train.jsonl", 24)
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert HUB_MODEL in examples[0]
    names: dict[str, Any] = {}
    for number, example in enumerate(examples):
        exec(compile(example.replace(HUB_MODEL, "base"), f"example {number}", "exec"), names)
    said = capsys.readouterr().out
    assert re.search(r"```\n(error: unknown field.*?)```", PAGE, re.DOTALL)[1] in said  # type: ignore[index]
    assert names["longer"].training.max_steps == 6
    assert names["run"].status == "finished"
    assert len(names["losses"].seen) == 6
    assert (tmp_path / "merged/config.json").is_file()


def test_the_page_names_what_there_is() -> None:
    named = set(re.findall(r"^\| `ftune\.(\w+)\(", PAGE, re.MULTILINE))
    functions = {name for name in ftune.__all__ if name.islower()}
    assert named == functions
    errors = {name for name in ftune.__all__ if isinstance(getattr(ftune, name), type)}
    errors = {name for name in errors if issubclass(getattr(ftune, name), ftune.FtuneError)}
    assert {name for name in errors if f"`{name}`" not in PAGE} <= {"FtuneError", "LocatedDataError"}
