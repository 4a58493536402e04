"""Launching: what is refused, who failed first, and one run through kill, stop and orphaning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from ftune.errors import FtuneError, RunFailed
from ftune.run import launch, processes
from ftune.run.launch import Failure, first_cause

# --- refusals ---


def test_processes_that_were_launched_launch_no_others() -> None:
    with pytest.raises(FtuneError, match="as one of 4") as refused:
        launch.require_launchable(2, {"WORLD_SIZE": "4"})
    assert "torchrun" in str(refused.value.help)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(FtuneError, match="there is 1 GPU here"):
        launch.require_launchable(2, {})
    launch.require_launchable(1, {})


def test_more_processes_than_fit_in_memory_are_refused_before_one_starts() -> None:
    with pytest.raises(FtuneError, match="--num-processes 100000: the libraries of .* fill the memory") as refused:
        launch.require_launchable(100_000, {})
    assert "CPU cores" in str(refused.value.help)


@pytest.mark.parametrize(
    ("joined", "kind", "world", "cuda", "wrong"),
    [
        (1, "NO", 1, False, None),
        (2, "MULTI_CPU", 2, False, None),
        (2, "MULTI_GPU", 2, True, None),
        (1, "NO", 2, False, "2 processes were launched, but accelerate joined 1"),
        (2, "MULTI_CPU", 2, True, "runs MULTI_CPU, where MULTI_GPU"),
        (2, "FSDP", 2, False, "runs FSDP"),
    ],
)
def test_accelerate_must_have_joined_what_was_launched(
    joined: int, kind: str, world: int, cuda: bool, wrong: str | None
) -> None:
    found: Any = SimpleNamespace(num_processes=joined, distributed_type=SimpleNamespace(value=kind))
    if wrong is None:
        processes.require_joined(found, world, cuda=cuda)
    else:
        with pytest.raises(RunFailed, match=wrong):
            processes.require_joined(found, world, cuda=cuda)


@pytest.mark.parametrize(
    ("environment", "wrong"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "host"}, None),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, as in one process of many, without MASTER_ADDR"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 in the environment"),
        ({"WORLD_SIZE": "x", "MASTER_ADDR": "host"}, "a launcher sets whole numbers"),
    ],
)
def test_what_is_left_of_a_launcher_in_the_environment_is_told(environment: dict[str, str], wrong: str | None) -> None:
    if wrong is None:
        processes.require_launcher(environment)
    else:
        with pytest.raises(FtuneError, match=wrong) as refused:
            processes.require_launcher(environment)
        assert f"unset {next(iter(environment))}" in str(refused.value.help)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [launch.threads_for(count) for count in (1, 2, 3, 16)] == [8, 4, 2, 1]


# --- who failed first ---


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        # What one says is known before the others lose it.
        ([Failure(0, 1, 20.4, "connection closed"), Failure(1, 2, 20.1, "bad row")], 1),
        # Killed at 20.9 and noticed in second 21; the other lost it at once.
        ([Failure(0, 1, 20.95, "connection closed"), Failure(1, -signal.SIGKILL, 21)], 1),
        # The same on a machine so busy that the launcher looked three seconds later.
        ([Failure(0, 1, 20.95, "connection closed"), Failure(1, -signal.SIGKILL, 24)], 1),
        # The launcher stopped the first one while a bug was being told.
        ([Failure(0, -signal.SIGTERM, 20), Failure(1, 1, 20.5, "Traceback")], 1),
        # It had to be killed, half a minute later.
        ([Failure(0, -signal.SIGKILL, 50), Failure(1, 1, 20.5, "Traceback")], 1),
    ],
)
def test_the_first_cause_is_told(failures: list[Failure], rank: int) -> None:
    assert first_cause(failures).rank == rank


def test_what_a_process_left_outlives_how_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    launch.leave_error("error: bad row", 2)
    failure = launch._failure(1, -signal.SIGTERM, 99.0, str(path))
    assert (failure.code, failure.message) == (2, "error: bad row")
    assert first_cause([Failure(0, -signal.SIGTERM, 1.0), failure]) is failure
    assert launch._report(failure) == 2
    assert launch._report(launch._failure(3, -signal.SIGKILL, 99.0, "nowhere")) == 137
    assert launch._report(Failure(0, 143, 99.0)) == 143
    err = capsys.readouterr().err
    assert err.count("bad row") == 1
    assert "process 3 was killed by SIGKILL" in err
    assert "143" not in err


# --- the life of a run ---

STEPS = 60


def start(recipe: Path, *flags: str) -> subprocess.Popen[str]:
    """Start ``ftune train --num-processes 2``."""
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    return subprocess.Popen(
        [sys.executable, "-m", "ftune", "train", str(recipe), "--num-processes", "2", *flags],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(launcher: int) -> dict[int, int]:
    """Rank and process id of what a launcher has started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
    return found


def wait_for_step(run: Path, step: int, launched: subprocess.Popen[str]) -> None:
    """Wait until ``metrics.jsonl`` has a step, while the run goes on."""
    ends = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert launched.poll() is None, launched.communicate()
        assert time.monotonic() < ends
        time.sleep(0.005)


def steps(run: Path) -> Iterator[tuple[int, float, float]]:
    return ((event["step"], event["loss"], event["grad_norm"]) for event in tiny.events(run, "step"))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_stopped_and_orphaned_a_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    made = {}
    for name in ("whole", "torn"):
        made[name] = tmp_path / f"{name}.yaml"
        made[name].write_text(
            tiny.recipe(
                tmp_path,
                data={"packing": False},
                training={"max_steps": STEPS, "micro_batch_size": 2},
                checkpoint={"every_steps": 2},
                output_dir=str(tmp_path / name),
            ).text
        )
    torn = tmp_path / "torn"

    # One process of two is killed: the other ends too, and the launcher says which it was.
    first = start(made["torn"])
    wait_for_step(torn, 8, first)
    os.kill(workers(first.pid)[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = first.communicate(timeout=60)
    assert time.monotonic() - began < 45
    assert first.returncode == 137
    assert err.count("error:") == 1, err
    assert "process 1 was killed by SIGKILL" in err
    assert "Traceback" not in err

    # SIGTERM reaches both, which save.
    second = start(made["torn"], "--resume")
    wait_for_step(torn, 20, second)
    second.terminate()
    _, err = second.communicate(timeout=60)
    assert second.returncode == 143
    assert err.count("stopped after step") == 1, err
    assert f"continue with `ftune train {made['torn']} --num-processes 2 --resume`" in err
    saved = json.loads((torn / "run.json").read_text())["measured"]["steps"]
    assert (torn / f"checkpoints/step-{saved}/manifest.json").is_file()

    # The launcher is killed: nobody goes on without it.
    third = start(made["torn"], "--resume")
    wait_for_step(torn, saved + 8, third)
    left = list(workers(third.pid).values())
    third.kill()
    third.communicate(timeout=60)  # ends when nobody holds the pipes any more, a moment before the processes end
    ends = time.monotonic() + 10
    while not all(gone(pid) for pid in left):
        assert time.monotonic() < ends, "orphans"
        time.sleep(0.05)
    assert json.loads((torn / "run.json").read_text())["status"] == "interrupted"

    for recipe, flags in ((made["torn"], ["--resume"]), (made["whole"], [])):
        done = start(recipe, *flags)
        out, err = done.communicate(timeout=300)
        assert done.returncode == 0, err
        assert out.count("at work:") == 1, "one process speaks"
    assert list(steps(torn)) == list(steps(tmp_path / "whole"))
    ours, theirs = (load_file(tmp_path / name / f"checkpoints/step-{STEPS}/trained.safetensors") for name in made)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
