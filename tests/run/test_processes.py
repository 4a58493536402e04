"""Two processes over gloo, launched by torchrun through the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from ftune.artifacts.training import train
from ftune.methods import METHODS
from ftune.recipe import load_checked

pytestmark = pytest.mark.slow


# All methods in one launch: starting two processes and importing the libraries takes longer than training.
EACH = """
import sys
from pathlib import Path
from ftune.artifacts.training import train
from ftune.recipe import load_checked
for path in sys.argv[1:]:
    train(load_checked(Path(path))[0], progress=False)
"""


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script or a module in two processes, through torchrun."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def recipe(where: Path, name: str, accumulation: int, run: str) -> Path:
    """Write a recipe: 19 chats in updates of 8 rows without packing, so that the last update of an epoch is short."""
    loaded = tiny.recipe(
        where,
        name,
        data={"packing": False, "train": {"path": str(where / "train.jsonl"), "max_examples": 19}},
        training={"max_steps": 4, "micro_batch_size": 2, "gradient_accumulation_steps": accumulation},
        output_dir=str(where / run),
    )
    path = where / f"{run}.yaml"
    path.write_text(loaded.text)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of every method in one process (``NAME-1``) and in two (``NAME-2``)."""
    where = tmp_path_factory.mktemp("processes")
    for name in METHODS:
        train(load_checked(recipe(where, name, 4, f"{name}-1"))[0], progress=False)
    script = where / "each.py"
    script.write_text(EACH)
    done = launch(str(script), *(str(recipe(where, name, 2, f"{name}-2")) for name in METHODS))
    assert done.returncode == 0, done.stderr
    return where


def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    done = launch("-m", "ftune", "train", str(recipe(tmp_path, "lora", 2, "run")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("at work:") == 1, "one process speaks"


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name: str, runs: Path) -> None:
    results = [runs / f"{name}-1", runs / f"{name}-2"]
    for processes, run in enumerate(results, start=1):
        assert json.loads((run / "run.json").read_text())["device"]["processes"] == processes
    one, two = (tiny.events(run, "step") for run in results)
    assert [step["target_tokens"] for step in one] == [step["target_tokens"] for step in two]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    ones, twos = (load_file(run / "checkpoints/step-4/trained.safetensors") for run in results)
    for key in ones:
        # AdamW divides by the root of the second moment: a difference in the last bit of a tiny gradient grows.
        assert (ones[key] - twos[key]).abs().mean() <= 1e-3 * ones[key].abs().mean(), key
    held_out = [tiny.events(run, "eval")[-1] for run in results]
    assert held_out[1]["loss"] == pytest.approx(held_out[0]["loss"], rel=1e-5)
    assert held_out[1]["target_tokens"] == held_out[0]["target_tokens"]
