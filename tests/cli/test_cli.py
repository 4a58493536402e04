"""The command line as people and scripts use it."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftune import cli
from ftune.artifacts.method_table import method_table
from ftune.artifacts.report import training_summary
from ftune.methods import METHODS

COMMANDS = [
    "init",
    "validate",
    "plan",
    "train",
    "eval",
    "predict",
    "merge",
    "convert",
    "chat",
    "methods",
    "schema",
    "report",
    "leaderboard",
]
GOLDEN = Path(__file__).parent / "golden"


def ftune(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ftune", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, output, errors."""
    sys.argv = ["ftune", *map(str, arguments)]
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe(tmp_path, evaluation={"metrics": ["contains"], "max_new_tokens": 4}).text)
    return path


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("width", [80, 120])
def test_help(command: str, width: int, golden: Callable[[Path, str], None]) -> None:
    done = ftune(*([command] if command else []), "--help", COLUMNS=str(width), TERMINAL_WIDTH=str(width))
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= width
    golden(GOLDEN / f"help-{command or 'ftune'}-{width}.txt", done.stdout)


@pytest.mark.parametrize("arguments", [["--help"], ["validate"], ["schema"], ["methods"], ["init", "--out", "-"]])
def test_light_commands_import_nothing_heavy_and_are_quick(arguments: list[str], recipe: Path) -> None:
    if arguments == ["validate"]:
        arguments = ["validate", str(recipe), "--no-data"]
    code = (
        "import sys, time; sys.argv = ['ftune', *sys.argv[1:]]\n"
        "from ftune import cli\n"
        "try: cli.main()\n"
        "except SystemExit as left: assert not left.code, left.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'bitsandbytes', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)), time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    imported, seconds = re.findall(r"^\[(.*)\] ([\d.]+)$", done.stderr, re.M)[-1]
    assert imported == ""
    # Half a second of CPU is the promise on an idle machine; a busy one stretches even CPU time.
    assert float(seconds) < 1.5


def test_train_eval_merge_chat(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out_dir = tmp_path / "run"
    code, out, _ = run(capsys, "train", recipe, "--set", "training.max_steps=3")
    assert code == 0
    assert "steps       3 updates" in out
    assert "done: 3 steps" in out
    code, _, err = run(capsys, "train", recipe, "--set", "training.max_steps=3")
    assert code == 2
    assert "already holds a run" in err
    assert "--overwrite" in err
    code, out, _ = run(capsys, "train", recipe, "--set", "training.max_steps=3", "--overwrite", "--json")
    assert code == 0
    assert json.loads(out)["status"] == "finished"
    code, out, _ = run(capsys, "eval", out_dir, "--base", "--json")
    assert code == 0
    assert set(json.loads(out)) >= {"base", "tuned"}
    code, out, _ = run(capsys, "eval", out_dir)
    assert code == 0
    assert out.splitlines()[0].split() == ["tuned"]
    code, out, _ = run(capsys, "merge", out_dir)
    assert code == 0
    assert (out_dir / "merged/config.json").is_file()
    assert "same top token" in out
    code, out, _ = run(capsys, "chat", out_dir, "--prompt", "Say hi.", "--max-new-tokens", "4")
    assert code == 0
    assert out.endswith("\n")


def test_chat_over_a_pipe(recipe: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "train", recipe)
    lines = iter(["hello", "/base", "hello", "/base", "/new", "/help", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, _ = run(capsys, "chat", tmp_path / "run", "--max-new-tokens", "3")
    assert code == 0
    assert "now talking to the base model" in out
    assert "already talking to the base model" in out
    assert "a new conversation" in out
    assert "/quit leaves" in out


def test_chat_takes_what_is_no_utf8_and_tells_of_a_closed_input(
    recipe: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "train", recipe)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/new\n"), encoding="utf-8"))
    code, out, _ = run(capsys, "chat", tmp_path / "run", "--max-new-tokens", "3")
    assert (code, "a new conversation" in out) == (0, True)
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = run(capsys, "chat", tmp_path / "run")
    assert (code, "standard input is closed" in err) == (2, True)


def test_a_mistake_is_two_without_a_traceback(recipe: Path) -> None:
    done = ftune("train", recipe, "--set", "method.rnak=8")
    assert done.returncode == 2
    assert "did you mean `rank`?" in done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["tran"], ["train"], ["train", "x.yaml", "--fast"], ["merge", "x", "--dtype", "int8"]]
)
def test_usage_mistakes_are_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.strip()
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--engine", "zero"], "--engine zero: there is no such engine"),
        (["--engine", "fsdp2", "--auto-batch"], "--auto-batch under fsdp2"),
        (["--engine", "fsdp2", "--set", "optimizer.name=adamw_8bit", "--set", "method={name: full}"], "optimizer.name"),
    ],
)
def test_what_an_engine_cannot_do_is_told_before_processes_start(
    flags: list[str],
    said: str,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ftune.run.launch.launch", lambda *_: pytest.fail("processes were started"))
    code, _, err = run(capsys, "train", recipe, "--num-processes", "2", *flags)
    assert code == 2
    assert said in err
    assert not (tmp_path / "run").exists()


def test_an_engine_that_would_change_nothing_is_not_planned_for(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "plan", recipe, "--engine", "deepspeed-zero2")
    assert code == 2
    assert "--engine deepspeed-zero2 in one process: there is nothing to share out" in err


def test_output_that_finds_no_room_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ftune.artifacts.method_table.method_table", full)
    code, _, err = run(capsys, "methods")
    assert (code, err) == (1, "error: the command failed: No space left on device\n  help: free the disk\n")


def test_interrupted_is_130(recipe: Path, tmp_path: Path) -> None:
    import signal
    import time

    process = subprocess.Popen(
        [sys.executable, "-m", "ftune", "train", str(recipe), "--set", "training.max_steps=5000"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and '"event": "step"' in metrics.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"continue with `ftune train {recipe} --set training.max_steps=5000 --resume`" in err
    assert "Traceback" not in err
    last = tiny.events(tmp_path / "run", "step")[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step-{last}/manifest.json").is_file()


@pytest.mark.parametrize("method", METHODS)
def test_init_writes_a_recipe_that_validates(
    method: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "init", method, "--model", "base", "--data", "train.jsonl")
    assert code == 0
    assert "next: ftune validate" in out
    text = (tmp_path / f"{method}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json")
    assert json.loads((tmp_path / "recipe.schema.json").read_text())["$schema"]
    code, out, err = run(capsys, "validate", f"{method}.yaml")
    assert code == 0, err
    assert method in out
    code, _, err = run(capsys, "init", method)
    assert code == 2
    assert "--force" in err


def test_init_says_what_the_columns_are(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    tiny.recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faq.csv").write_text('question,answer\n"What, now?","Wait."\nWho?,Me.\n')
    code, out, _ = run(capsys, "init", "lora", "--model", "base", "--data", "faq.csv")
    assert code == 0
    assert "`question` is the instruction, `answer` is the output" in out
    code, _, err = run(capsys, "validate", "lora.yaml")
    assert code == 0, err


@pytest.mark.parametrize("arguments", [["foo"], ["lora", "--out", "no/such/x.yaml"], ["lora", "--out", ".", "--force"]])
def test_init_mistakes_are_two(arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "init", *arguments)
    assert code == 2
    assert err.startswith("error:")


def test_an_output_dir_that_cannot_be_written_is_two(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "train", recipe, "--set", "output_dir=/proc/nothing/here")
    assert code == 2
    assert "choose another output_dir" in err


def test_validate_shows_what_is_trained(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "validate", recipe, "--data")
    assert code == 0
    assert "Blue." in out
    code, out, _ = run(capsys, "validate", recipe, "--json")
    assert json.loads(out)["valid"] is True


def test_plan_as_json_is_what_a_run_keeps(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "plan", recipe, "--json")
    planned = json.loads(out)
    run(capsys, "train", recipe)
    kept = json.loads((tmp_path / "run/run.json").read_text())["plan"]
    for part in ("model", "method", "data", "training", "memory"):
        assert planned[part] == kept[part], part


def test_methods_lists_the_union(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "methods", "--json")
    assert [row["name"] for row in json.loads(out)] == list(METHODS)
    _, out, _ = run(capsys, "methods")
    assert [line.split()[0] for line in out.splitlines()[2 : 2 + len(METHODS)]] == list(METHODS)


@pytest.mark.parametrize(("width", "columns"), [(80, 4), (100, 6), (120, 7)])
def test_the_table_of_methods_drops_columns_but_never_what_is_trained(width: int, columns: int) -> None:
    out = method_table(width)
    assert max(map(len, out.splitlines())) <= width
    assert len(re.split(" {2,}", out.splitlines()[0])) == columns
    for line, (name, cls) in zip(out.splitlines()[2:], METHODS.items(), strict=False):
        assert len(cls.summary) <= 54
        assert line.startswith(f"{name} ")
        assert line.endswith(f" {cls.summary}")
    assert out.endswith("`ftune methods NAME` says more")
    assert method_table(40) == method_table(80)


def test_a_pause_that_is_passed_already_saves_nothing_and_says_so(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unmeasured = ("data.eval=null", "evaluation.metrics=[]", "tracking=[]")
    arguments = ("train", recipe, "--until", "2", *(part for value in unmeasured for part in ("--set", value)))
    run(capsys, *arguments)
    code, out, _ = run(capsys, *arguments, "--resume")
    assert code == 0
    assert "paused: --resume goes on (every step had been made before)" in out
    assert not (tmp_path / "run/adapter").exists()


def test_the_summary_after_training_is_wrapped() -> None:
    measured = dict.fromkeys(("steps", "wall_seconds", "tokens_per_second", "first_loss", "loss", "held_out_loss"), 1e3)
    measured |= dict.fromkeys(("peak_bytes", "predicted_peak_bytes"), 10**9) | {"predicted_over_measured": 1.0}
    vitals = " ".join(["gain 0.123,"] * 12)
    record = {
        "measured": measured,
        "plan": {"method": {"artifact": "adapter"}},
        "vitals": {"gain": 0.1},
        "vitals_line": vitals,
    }
    lines = training_summary(record, "runs/a directory", 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "saved: runs/a directory/adapter"
    first = next(i for i, line in enumerate(lines) if line.startswith("at work: "))
    assert first + 2 == len(lines) - 1
    assert lines[first + 1].startswith("  gain")
    assert " ".join(" ".join(lines[first:-1]).split()) == f"at work: {vitals}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_full(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "methods", name)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    flat = " ".join(out.split())
    cls = METHODS[name]
    for said in (cls.formula, cls.choose, cls.avoid, cls.cost, cls.composes):
        assert " ".join(said.split()) in flat


def test_an_unknown_method_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "methods", "dorra")
    assert code == 2
    assert "did you mean `dora`" in err


def test_a_plan_that_does_not_fit_exits_3_with_options_to_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe(tmp_path).text)
    monkeypatch.chdir(tmp_path)  # the sizes are found by name from anywhere
    plan = ("plan", path, "--sizes", "llama-3-8b", "--device", "9GiB")
    code, out, _ = run(capsys, *plan)
    assert code == 3
    assert "does not fit" in out
    assert "--set model.dtype=bfloat16 --set 'method.quantization={type: nf4}': needs" in " ".join(out.split())
    options = ["--set", "model.dtype=bfloat16", "--set", "method.quantization={type: nf4}"]
    code, out, _ = run(capsys, *plan, *options)
    assert code == 0
    assert "to spare" in out
    code, out, _ = run(capsys, *plan, "--json")
    assert code == 3
    assert json.loads(out)["fits"] is False
