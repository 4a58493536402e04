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

from ftune.methods import METHODS

pytestmark = pytest.mark.slow


def launch(processes: int, recipe: Path) -> subprocess.CompletedProcess[str]:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    launcher = torchrun if processes > 1 else [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, "-m", "ftune", "train", str(recipe)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name: str, tmp_path: Path) -> None:
    # 24 chats in updates of 8 rows without packing: the last update of an epoch is short.
    results = []
    for processes, accumulation in ((1, 4), (2, 2)):
        run = tmp_path / f"on-{processes}"
        loaded = tiny.recipe(
            tmp_path,
            name,
            data={"packing": False, "train": {"path": str(tmp_path / "train.jsonl"), "max_examples": 19}},
            training={"max_steps": 4, "micro_batch_size": 2, "gradient_accumulation_steps": accumulation},
            output_dir=str(run),
        )
        path = tmp_path / f"{processes}.yaml"
        path.write_text(loaded.text)
        done = launch(processes, path)
        assert done.returncode == 0, done.stderr
        assert json.loads((run / "run.json").read_text())["device"]["processes"] == processes
        results.append(run)
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
