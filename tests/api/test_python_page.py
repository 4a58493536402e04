"""The examples of docs/python.md run, in order, as a reader would run them."""

from __future__ import annotations

import ast
import json
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


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells in order, in one namespace; what a cell ends with is shown as a notebook would show it."""
    monkeypatch.chdir(tmp_path)
    book = json.loads((Path(__file__).parents[2] / "docs/python.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    shown = []
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
            shown += [value._repr_html_()] if hasattr(value, "_repr_html_") else []
    assert [type(names[name]) for name in ("recipe", "run")] == [ftune.Recipe, ftune.Run]
    assert len(shown) == 6
    assert all(text.startswith("<pre>") for text in shown)
    losses = names["losses"]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
