"""`ftune validate` as people use it: the recipe, its data, and a row as it is trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftune import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Write files and a recipe with some data block, validate it: exit code, output, errors."""
    tiny.recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def validate(data: str, *arguments: str, **files: str) -> tuple[int, str, str]:
        for name, text in files.items():
            path = Path(name.replace("__", "/").replace("_", "."))
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        Path("r.yaml").write_text(f"model: base\nmethod: lora\ndata: {data}\noutput_dir: out\n")
        capsys.readouterr()  # what libraries say when they are first imported
        monkeypatch.setattr(sys, "argv", ["ftune", "validate", "r.yaml", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return validate


CSV = "ticket_text,team\nPrinter is broken,hardware\nNo mail,007\n"
COLUMNS = 'columns: {prompt: "Ticket: {ticket_text} Team:", completion: " {team}"}'


def test_the_data_is_read_and_counted(run: Run) -> None:
    code, out, _ = run(f"{{train: {{path: t.csv, {COLUMNS}}}, eval: t.csv}}", t_csv=CSV)
    assert code == 0
    assert out.splitlines()[0] == "r.yaml: valid (lora on base)"
    assert "data.train: t.csv: format prompt_completion, 2 rows" in out
    assert "2 of 2 held-out examples are trained on as well (2 to the last token)" in out


def test_a_row_is_shown_as_it_is_trained(run: Run) -> None:
    data = f"{{train: {{path: t.csv, {COLUMNS}}}}}"
    code, out, _ = run(data, "--row", "2", "--row", "1", t_csv=CSV)
    assert code == 0
    assert out.startswith("format prompt_completion: row 2, trained on;")
    assert "--- t.csv:3: " in out
    assert "Ticket: No mail Team:⟦ 007<|im_end|>⟧" in out
    assert out.index("No mail") < out.index("Printer")
    code, _, err = run(data, "--row", "3")
    assert code == 2
    assert "there is no row 3: t.csv has 2" in err
    _, out, _ = run(data, "--row", "1", "--json")
    shown = json.loads(out)
    assert shown["data"]["train"]["rows"] == 2
    assert "Printer" in shown["shown"][0]


def test_a_row_that_is_held_out_says_so(run: Run) -> None:
    text = "".join(f'{{"text": "row {n}"}}\n' for n in range(10))
    data = "{train: t.jsonl, eval_fraction: 0.2}"
    arguments = [part for n in range(1, 11) for part in ("--row", str(n))]
    code, out, _ = run(data, *arguments, t_jsonl=text)
    assert code == 0
    assert (out.count("trained on;"), out.count("held out;")) == (8, 2)


def test_all_mistakes_of_all_rows_and_sources_come_at_once(run: Run) -> None:
    rows = [json.dumps({"text": "x" if n % 2 else None}) for n in range(30)]
    code, _, err = run("{train: t.jsonl, eval: e.csv}", t_jsonl="\n".join(rows), e_csv="text,label\na,b\n")
    assert code == 2
    assert "15 of 30 rows do not fit the format `text`" in err
    for line in range(1, 31, 2):
        assert f"t.jsonl:{line}: `text`: found null" in err
    assert "error: e.csv: the column `label` would not be used" in err
    assert "Traceback" not in err


def test_every_row_that_the_template_refuses_is_named(run: Run) -> None:
    template = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    template += "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    chat: Callable[[str], Any] = lambda said: {  # noqa: E731
        "messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "x"}]
    }
    rows = "\n".join(json.dumps(chat(said)) for said in ("no", "yes", "no"))
    code, _, err = run("{train: t.jsonl, chat_template: c.jinja}", t_jsonl=rows, c_jinja=template)
    assert code == 2
    assert "2 of 3 rows cannot be written as tokens" in err
    assert "t.jsonl:1: the chat template refuses" in err
    assert "t.jsonl:3: the chat template refuses" in err


def test_an_unknown_column_is_shown_where_the_recipe_names_it(run: Run) -> None:
    code, _, err = run('{train: {path: t.csv, columns: {prompt: "{tiket_text}", completion: team}}}', t_csv=CSV)
    assert code == 2
    assert "error: t.csv has no column `tiket_text`" in err
    assert "--> r.yaml:3:47" in err
    assert "did you mean `ticket_text`? The columns are `ticket_text`, `team`" in err


def test_the_recipe_alone(run: Run) -> None:
    code, out, _ = run("t.jsonl", "--no-data", t_jsonl="not json")
    assert (code, out) == (0, "r.yaml: valid (lora on base)\n")
    code, _, err = run("t.jsonl")
    assert code == 2
    assert "t.jsonl:1:1: not valid JSON" in err
    code, _, err = run("t.jsonl", "--no-data", "--row", "1")
    assert code == 2
    assert "--row needs the data" in err


def test_without_a_tokenizer_the_rows_are_checked_all_the_same(run: Run) -> None:
    Path("base/tokenizer.json").unlink()
    Path("base/tokenizer_config.json").unlink(missing_ok=True)
    code, _, err = run("t.jsonl", t_jsonl='{"text": "a"}\n')
    assert code == 2
    assert "--no-data checks the recipe alone" in err
    code, _, err = run("t.jsonl", t_jsonl="not json")
    assert "t.jsonl:1:1: not valid JSON" in err


def test_what_the_plan_tells_of_rows_is_told(run: Run) -> None:
    turns = [{"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": [*turns, {"role": "user", "content": "and?"}]}]
    code, out, _ = run("{train: t.jsonl}", t_jsonl="".join(json.dumps(row) + "\n" for row in rows))
    assert code == 0
    for said in ("does not show `name` of user messages", "messages behind the last answer", "no rows are held out"):
        assert out.count(said) == 1, out
