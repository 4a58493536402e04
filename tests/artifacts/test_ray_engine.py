"""Ray Train as the engine: what it refuses; and, where Ray is installed, two workers of which one is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
from safetensors.torch import load_file
from typer.testing import CliRunner

from ftune.artifacts.ray_engine import _digest, _started_again, require_ray
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.cli import app
from ftune.errors import FtuneError
from ftune.recipe import load_checked
from ftune.run.events import Resumed


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FtuneError) as caught:
        require_ray()
    assert caught.value.help == "pip install 'ftune[ray]'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "ray"], "go together"),
        (["--num-workers", "2"], "go together"),
        (["--engine", "spark", "--num-workers", "2"], "go together"),
    ],
)
def test_half_a_request_is_refused(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["train", "recipe.yaml", *options])
    assert isinstance(result.exception, FtuneError)
    assert message in result.exception.message


def test_a_worker_knows_whether_an_attempt_of_its_launch_was_lost(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert not _started_again(run, None)
    run.write({"status": "failed", "started": "yesterday"})
    older = _digest(run)
    assert not _started_again(run, older), "a run that was here before the launch"
    assert _started_again(run, None), "made by this launch"
    run.write({"status": "running", "started": "today"})
    assert _started_again(run, older), "continued or replaced by this launch"


def recipe(where: Path, run: str, accumulation: int) -> Path:
    loaded = tiny.recipe(
        where,
        data={"packing": False, "train": {"path": str(where / "train.jsonl"), "max_examples": 19}},
        optimizer={"learning_rate": 1e-3},
        training={"max_steps": 60, "micro_batch_size": 2, "gradient_accumulation_steps": accumulation},
        checkpoint={"every_steps": 2},
        output_dir=str(where / run),
    )
    path = where / f"{run}.yaml"
    path.write_text(loaded.text)
    return path


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`: pip install 'ftune[ray]'")
def test_a_killed_worker_is_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    two = recipe(tmp_path, "two", 2)
    log = tmp_path / "log"
    with log.open("w") as file:
        ray = subprocess.Popen(
            [sys.executable, "-m", "ftune", "train", str(two), "--engine", "ray", "--num-workers", "2"],
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 240
    while not any((tmp_path / "two/checkpoints").glob("step-*/manifest.json")):
        assert time.monotonic() < deadline, log.read_text()
        assert ray.poll() is None, log.read_text()
        time.sleep(0.01)
    # Ray gives its workers titles of their own; some carry the actor's class, all descend from the driver.
    workers = [
        process
        for process in psutil.Process(ray.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join([process.name(), *process.cmdline()])
    ]
    assert len(workers) == 2, [process.cmdline() for process in psutil.Process(ray.pid).children(recursive=True)]
    workers[1].send_signal(signal.SIGKILL)
    assert ray.wait(240) == 0, log.read_text()
    assert tiny.events(tmp_path / "two", Resumed(0, "").name), "it went on, and did not start again"
    assert not (tmp_path / ".ray").exists()

    train(load_checked(recipe(tmp_path, "one", 4))[0], progress=False)
    first, second = (tiny.events(tmp_path / run, "step") for run in ("one", "two"))
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    weights = [load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("one", "two")]
    for key, tensor in weights[0].items():
        assert (tensor - weights[1][key]).abs().max() <= 1e-6, key
