"""Two hosts as network namespaces, joined by torchrun's rendezvous; one is lost, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from ftune.artifacts.training import train
from ftune.recipe import load_checked
from ftune.run.events import Resumed

pytestmark = pytest.mark.slow

PORT = 29511  # inside the namespaces, where no one else listens


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """Two hosts, each by its name and its address; their only network is a cable between them."""
    names = [f"ft{os.getpid()}{side}" for side in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"]
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            # The cable's ends are named as their hosts are.
            ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1])
            for name, address in zip(names, addresses, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", name, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in made:
            kill_host(name)
            ip("netns", "delete", name)


def kill_host(name: str) -> None:
    """Power off: every process of the host gets SIGKILL."""
    for pid in ip("netns", "pids", name).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def launch(hosts: list[tuple[str, str]], recipe: Path, *options: str) -> list[subprocess.Popen[str]]:
    """Start the command of docs/clusters.md on every host."""
    endpoint = f"{hosts[0][1]}:{PORT}"
    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 0"
    rendezvous = f"--rdzv-id job --rdzv-backend c10d --rdzv-endpoint {endpoint}"
    launched = []
    for index, (name, address) in enumerate(hosts):
        side = f"--rdzv-conf is_host={str(index == 0).lower()} --local-addr {address}"
        with recipe.with_name(f"{name}.log").open("a") as log:
            launched.append(
                subprocess.Popen(
                    [*f"ip netns exec {name} {torchrun} {rendezvous} {side} -m ftune train {recipe}".split(), *options],
                    env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": name},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return launched


def recipe(where: Path, run: str, steps: int, accumulation: int) -> Path:
    loaded = tiny.recipe(
        where,
        data={"packing": False, "train": {"path": str(where / "train.jsonl"), "max_examples": 19}},
        optimizer={"learning_rate": 1e-3},
        training={"max_steps": steps, "micro_batch_size": 2, "gradient_accumulation_steps": accumulation},
        checkpoint={"every_steps": 2},
        output_dir=str(where / run),
    )
    path = where / f"{run}.yaml"
    path.write_text(loaded.text)
    return path


def test_a_host_is_lost_and_the_run_goes_on(hosts: list[tuple[str, str]], tmp_path: Path) -> None:
    """Also holds, by the end, that two hosts give what one process gives."""
    steps = 40
    two, checkpoints = recipe(tmp_path, "two", steps, 2), tmp_path / "two/checkpoints"

    def logs() -> str:
        return "\n".join((tmp_path / f"{name}.log").read_text() for name, _ in hosts)

    launched = launch(hosts, two)
    deadline = time.monotonic() + 120
    while not (checkpoints / "step-4/manifest.json").exists() and not (checkpoints / "step-6").exists():
        assert time.monotonic() < deadline, logs()
        assert all(host.poll() is None for host in launched), logs()
        time.sleep(0.01)
    kill_host(hosts[1][0])
    # Its peer ends by itself, at once: the socket is closed, and no timeout has to run out.
    assert launched[0].wait(30) == 1, logs()
    launched[1].wait(30)
    saved = [int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")]
    assert max(saved) < steps, "the host was lost half-way"
    assert not (tmp_path / "two/adapter").exists()

    for host in launch(hosts, two, "--resume"):
        assert host.wait(120) == 0, logs()
    assert tiny.events(tmp_path / "two", Resumed(0, "").name), "it went on, and did not start again"

    train(load_checked(recipe(tmp_path, "one", steps, 4))[0], progress=False)
    first, second = (tiny.events(tmp_path / run, "step") for run in ("one", "two"))
    assert [step["step"] for step in second] == list(range(1, steps + 1))
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    weights = [load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("one", "two")]
    for key, tensor in weights[0].items():
        assert (tensor - weights[1][key]).abs().max() <= 1e-6, key
