"""A method is one file and one line: a copy of the package with a toy method trains, resumes and merges it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import ftune

TOY = '''
"""BitFit of the output: one trained vector added to the output of every feed-forward block."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from ftune.methods.base import Context, Method, ModelShape


class Toy(Method):
    """Add a trained vector to the output of every ``down_proj``."""

    paper: ClassVar[str] = "arXiv:2106.10199"
    summary: ClassVar[str] = "a bias on every feed-forward block"
    formula: ClassVar[str] = "h = W x + b"
    typical_share: ClassVar[str] = "0.002 %"
    choose: ClassVar[str] = "in tests"
    avoid: ClassVar[str] = "elsewhere"
    cost: ClassVar[str] = "nothing"
    evidence: ClassVar[str] = "none"
    composes: ClassVar[str] = "packing"
    mergeable: ClassVar[bool] = False
    not_mergeable_because: ClassVar[str] = "the base has no bias to add to"
    not_lora_because: ClassVar[str] = "a vector is no matrix"
    saved_as: ClassVar[Literal["peft", "transformers", "ftune"]] = "ftune"

    name: Literal["toy"] = Field("toy", description="A toy.")
    start: float = Field(0.0, description="Value that the vectors start from.")

    def _layers(self, model: Any) -> list[Any]:
        return [module for name, module in model.named_modules() if name.endswith("down_proj")]

    def adapt(self, model: Any, context: Context) -> Any:
        import torch

        model.requires_grad_(False)
        for layer in self._layers(model):
            layer.bias = torch.nn.Parameter(torch.full((layer.out_features,), self.start))
        return model

    def vitals(self, model: Any, optimizer: Any) -> dict[str, float]:
        return {"largest": max(float(layer.bias.detach().abs().max()) for layer in self._layers(model))}

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        return None if vitals["largest"] > 1e-6 else "every vector is zero"

    def save(self, model: Any, out: Path, context: Context) -> None:
        from safetensors.torch import save_file

        save_file({str(i): layer.bias.detach() for i, layer in enumerate(self._layers(model))}, out / "toy.safetensors")

    def load(self, base: Any, directory: Path, context: Context) -> Any:
        from safetensors.torch import load_file

        self.adapt(base, context)
        for i, layer in enumerate(self._layers(base)):
            layer.bias.data = load_file(directory / "toy.safetensors")[str(i)]
        return base.requires_grad_(False)

    def trainable_parameters(self, shape: ModelShape) -> int:
        return shape.layers * shape.hidden
'''

# In one process: importing the libraries takes longer than the rest.
EVERY = """
import json, sys
from typer.testing import CliRunner
from ftune.cli import app
from ftune.errors import FtuneError

said = []
for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, command)
    failed = isinstance(error := result.exception, FtuneError)
    said.append((error.exit_code, error.render()) if failed else (result.exit_code, result.stdout))
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_method_is_one_file_and_one_line(tmp_path: Path) -> None:
    package = tmp_path / "source/ftune"
    shutil.copytree(Path(ftune.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "methods/toy.py").write_text(TOY)
    union = package / "methods/__init__.py"
    before = union.read_text()
    line = before.replace("    Field(discriminator", "    | Toy,\n    Field(discriminator").replace(
        ",\n    | Toy,", "\n    | Toy,"
    )
    union.write_text(line.replace("\nAnyMethod = ", "\nfrom ftune.methods.toy import Toy\n\nAnyMethod = "))
    tiny.recipe(tmp_path)  # writes the model and the data
    recipe = {
        "model": {"id": str(tmp_path / "base"), "dtype": "float32"},
        "method": "toy",
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "max_length": 256},
        "training": {"max_steps": 4},
        "optimizer": {"learning_rate": 0.01},
        "output_dir": str(tmp_path / "toy"),
    }
    (tmp_path / "toy.yaml").write_text(json.dumps(recipe))
    idle = ["--set", "optimizer.learning_rate=1e-30", "--set", f"output_dir={tmp_path}/idle"]
    commands = [
        ["methods", "toy"],
        ["validate", "toy.yaml", "--set", "method={name: toy, strat: 1}"],
        ["init", "toy", "--out", "-"],
        ["train", "toy.yaml"],
        ["eval", "toy", "--json"],
        ["merge", "toy"],
        ["train", "toy.yaml", *idle],
    ]
    done = subprocess.run(
        [sys.executable, "-c", EVERY, json.dumps(commands)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{package.parent}"},
    )
    assert done.returncode == 0, done.stderr
    codes, (methods, validate, init, train, evaluated, merge, failed) = zip(*json.loads(done.stdout), strict=True)
    assert codes == (0, 2, 0, 0, 0, 2, 1)
    assert "arXiv:2106.10199" in methods
    assert "`strat` for method `toy`" in validate
    assert "start" in init
    assert "at work: largest" in train
    record = json.loads((tmp_path / "toy/run.json").read_text())
    assert record["plan"]["method"]["trainable"] == 2 * 64
    assert abs(json.loads(evaluated)["tuned"]["loss"] - record["measured"]["held_out_loss"]) < 1e-5
    assert "no bias to add to" in merge
    # A method that does nothing fails the run.
    assert "`toy` was not at work: every vector is zero" in failed
    assert not (tmp_path / "idle/adapter").exists()
