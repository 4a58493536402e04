"""What SECURITY.md promises about code: none runs that came with a model, a run directory or a data set."""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ftune
from ftune.errors import DataError, FtuneError, ModelError, RunFailed
from ftune.run.tensors import read_tensors

ROOT = Path(ftune.__file__).parent

# Only between a process and those it started itself, through pipes that nobody else can write to.
PICKLE_ALLOWED = {"data/workers.py"}
READS_A_MODEL = ("from_pretrained", "from_config")
OF_TRANSFORMERS = ("Auto",)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


def unsafe(file: str, source: str) -> list[str]:
    """Calls that could run code out of a file."""
    found = []
    for name, call in calls(source):
        leaf = name.rpartition(".")[2]
        of_safe_yaml = f"class {keyword(call, 'Loader')}(yaml.SafeLoader)" in source
        bad = (
            (name in ("torch.load", "load_state_dict_from_url") and keyword(call, "weights_only") != "True")
            or (name in ("pickle.load", "pickle.loads", "pickle.Unpickler") and file not in PICKLE_ALLOWED)
            or name
            in ("eval", "exec", "__import__", "os.system", "os.popen", "joblib.load", "dill.load", "marshal.loads")
            or (name.startswith("yaml.") and leaf.startswith(("load", "full_load", "unsafe_load")) and not of_safe_yaml)
            or (leaf in ("load", "load_all") and name.startswith("cloudpickle"))
            or keyword(call, "allow_pickle") == "True"
            or keyword(call, "shell") == "True"
            or keyword(call, "weights_only") == "False"
            or keyword(call, "trust_remote_code") == "True"
            or (leaf in ("Environment", "Template") and "jinja2" in source)  # without a sandbox
        )
        if leaf in READS_A_MODEL and name.rpartition(".")[0].rpartition(".")[2].startswith(OF_TRANSFORMERS):
            # said outright, or among the keywords of `_source`, which always says it
            stars = [ast.unparse(word.value) for word in call.keywords if word.arg is None]
            bad |= keyword(call, "trust_remote_code") is None and not any(
                star == "source" or "_source(" in star or star == "settings" for star in stars
            )
        if bad:
            found.append(f"{file}:{call.lineno}: {ast.unparse(call)[:80]}")
    return found


def test_nothing_in_ftune_runs_code_out_of_a_file() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 50
    assert [line for file in files for line in unsafe(str(file.relative_to(ROOT)), file.read_text())] == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.load(f)",
        "yaml.load(f, yaml.Loader)",
        "np.load(f, allow_pickle=True)",
        "AutoConfig.from_pretrained(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "jinja2.Template(x)",
        "from jinja2 import Environment\nEnvironment()",
        "class A(yaml.SafeLoader):\n    pass\nyaml.load(f, Loader=B)",
        "eval(x)",
    ],
)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert unsafe("x.py", line)


def test_a_pickle_in_a_run_directory_does_not_run(tmp_path: Path) -> None:
    for name, write in (
        ("torch", torch.save),
        ("plain", lambda bomb, path: path.write_bytes(pickle.dumps(bomb, protocol=2))),
    ):
        target = tmp_path / f"{name}-exploded"
        write({"state": Bomb(target)} if name == "torch" else Bomb(target), tmp_path / "optimizer.pt")
        with pytest.raises(RunFailed, match="something else"):
            read_tensors(tmp_path / "optimizer.pt")
        assert not target.exists()
    # and the bomb is one
    torch.save(Bomb(target), tmp_path / "optimizer.pt")
    torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert target.exists()


def test_the_environment_cannot_turn_that_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "optimizer.pt")
    with pytest.raises(RunFailed):
        read_tensors(tmp_path / "optimizer.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_pickled_adapter_is_refused(tmp_path: Path) -> None:
    from ftune.methods.adapter_files import load_peft

    torch.save({"x": Bomb(tmp_path / "exploded")}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(ModelError, match="no pickle"):
        load_peft(torch.nn.Linear(2, 2), tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_pickled_weights_are_refused_where_the_model_is_loaded(tmp_path: Path) -> None:
    import tiny

    from ftune.plan.base_model import load_base
    from ftune.recipe.schema import ModelSpec

    tiny.config().save_pretrained(tmp_path)
    torch.save({"x": Bomb(tmp_path / "exploded")}, tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="no pickle"):
        load_base(ModelSpec(id=str(tmp_path)), tiny.method("lora"), torch.float32, torch.device("cpu"))
    assert not (tmp_path / "exploded").exists()


CODE = """import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig
class X(LlamaConfig):
    pass
"""


@pytest.fixture
def model_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    import json

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "model").mkdir()
    marker = tmp_path / "ran"
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.X"}}))
    (tmp_path / "model/own.py").write_text(CODE.format(marker=str(marker)))
    return tmp_path / "model", marker


def test_a_models_code_does_not_run(model_with_code: tuple[Path, Path]) -> None:
    from ftune.plan.base_model import load_config
    from ftune.recipe.schema import ModelSpec

    directory, marker = model_with_code
    with pytest.raises(FtuneError, match="needs Python code that comes with the model") as refused:
        load_config(ModelSpec(id=str(directory)))
    assert not marker.exists()
    # in the recipe's words, not in those of transformers' arguments
    assert "trust_remote_code: true" in refused.value.render()
    assert "trust_remote_code=True" not in refused.value.render()


def test_where_it_is_trusted_it_is_shouted(
    model_with_code: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ftune.plan import base_model
    from ftune.recipe.schema import ModelSpec

    directory, marker = model_with_code
    base_model._shout.cache_clear()
    base_model.load_config(ModelSpec(id=str(directory), trust_remote_code=True))
    assert marker.exists()
    assert "WARNING: trust_remote_code is ON" in capsys.readouterr().err


def test_a_recipe_that_trusts_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftune.recipe import parse_recipe, warnings

    text = "model: {id: org/x, trust_remote_code: true}\nmethod: lora\ndata: d.jsonl\noutput_dir: runs/x\n"
    assert any("TRUST_REMOTE_CODE IS ON" in line and "r:1:" in line for line in warnings(parse_recipe(text, "r")))


def through(tokenizer: Any, turns: tuple[dict[str, str], ...]) -> None:
    from ftune.data.chat import load_template
    from ftune.data.formats import Conversation
    from ftune.data.spans import render

    template = load_template(tokenizer)
    assert template is not None
    render(Conversation(turns, 0), tokenizer, template)


@pytest.mark.parametrize(
    "body",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.mkdir('x') }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
    ],
)
def test_chat_templates_run_in_the_sandbox(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.kit import TEMPLATES, build_tokenizer

    monkeypatch.chdir(tmp_path)
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    for template in (TEMPLATES["chatml"], TEMPLATES["marks"]):
        tokenizer = build_tokenizer(template + body)
        with pytest.raises(DataError):
            through(tokenizer, turns)
    assert not any(tmp_path.iterdir())
