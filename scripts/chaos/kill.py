"""Kill -9 a run at many moments, resume it each time, and compare the end with that of a run nobody touched.

    python scripts/chaos/kill.py --kills 100 --methods lora adalora galore qlora full

Half of the kills come at a random time after the start, half right before a random operation on a file (opening,
renaming, deleting, fsync): saving, rotating, the manifest, run.json and metrics.jsonl are all made of these. The run
is a tiny random Llama in fp32 on the CPU, 60 steps, a checkpoint after every 4th and an evaluation after every 3rd.
A run that ends before the kills are used up is compared, and another is begun.

Starting Python and importing torch takes seconds, so one process imports everything and forks each attempt; it
starts no thread before. What is compared, bit for bit: the trained parameters of the last checkpoint, the saved
adapter or model, and loss and gradient norm of every step and every held-out loss in metrics.jsonl.

``--every-operation`` kills at each operation of one whole run once, instead of at random; ``--full-disk`` lets the
disk be full from a random operation on instead, and then frees it.

``--processes 2`` shares each run among two processes (``--engine ddp`` or ``fsdp2``), of which one is killed, either
with the same chance. What the launcher would do then is done to the other: SIGTERM, and SIGKILL up to a second later.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
for place in (HERE, HERE.parents[1] / "tests", HERE.parents[1]):
    sys.path.insert(0, str(place))

import bitsandbytes  # noqa: E402, F401
import peft  # noqa: E402, F401
import tiny  # noqa: E402
from faults import Faults  # noqa: E402

from ftune.artifacts.training import train  # noqa: E402
from ftune.errors import FtuneError, RunFailed  # noqa: E402


def attempt(loaded: Any, engine: str | None, at: int, full: bool, done: int) -> int:
    """Train or resume in a forked process; its exit code. Writes the number of file operations to ``done``."""
    root = Path(loaded.recipe.output_dir)
    faults = Faults(root, at, full=full)
    try:
        train(loaded, resume=root.exists(), progress=False, engine=engine)
    except RunFailed as error:
        if not full or "No space left" not in str(error):
            os.write(done, error.render().encode())
            return 3
        return 1
    except FtuneError as error:
        # A full disk before the run began is the user's to mend.
        if full and "No space left" in str(error):
            return 2
        os.write(done, error.render().encode())
        return 3
    os.write(done, f"{faults.count}\n".encode())
    return 0


def start(loaded: Any, engine: str | None, at: int, full: bool, place: dict[str, str]) -> tuple[int, int]:
    """Fork one process of an attempt; its id, and a pipe for the number of its file operations or its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 4
        try:
            os.environ.update(place)
            sys.stderr = sys.stderr if os.environ.get("CHAOS_LOUD") else open(os.devnull, "w")  # noqa: SIM115
            code = attempt(loaded, engine, at, full, writing)
            if place:
                from torch import distributed

                distributed.destroy_process_group()
        except BaseException:
            os.write(writing, traceback.format_exc()[-8000:].encode())
        os._exit(code)
    os.close(writing)
    return child, reading


def fork(
    loaded: Any,
    *,
    processes: int = 1,
    engine: str | None = None,
    at: int = 0,
    full: bool = False,
    after: float | None = None,
    victim: int = 0,
    grace: float = 0.0,
) -> tuple[int, int]:
    """One attempt: wait status of the process ``victim``, and its file operations where it came to its end.

    Args:
        loaded: The recipe.
        processes: That share the run.
        engine: How.
        at: The file operation at which the victim is killed, or its disk is full; 0: none.
        full: Whether the disk is full instead.
        after: Seconds after which the victim is killed.
        victim: Its rank.
        grace: Seconds between the SIGTERM and the SIGKILL of the others, once the victim is dead.
    """
    places: list[dict[str, str]] = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [start(loaded, engine, at if rank == victim else 0, full, place) for rank, place in enumerate(places)]
    child, reading = started.pop(victim)
    if after is not None and not select.select([reading], [], [], after)[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status and started:
        for other, _ in started:
            os.kill(other, signal.SIGTERM)
        time.sleep(grace)
    for other, pipe in started:
        if status:
            os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.close(pipe)
    text = os.read(reading, 2**16).decode()
    os.close(reading)
    if text and not text.strip().isdigit():
        print(text, file=sys.stderr)
    return status, int(text) if text.strip().isdigit() else 0


def finished(root: Path) -> bool:
    record = root / "run.json"
    return record.is_file() and json.loads(record.read_text())["status"] == "finished"


def fingerprint(root: Path, steps: int) -> dict[str, str]:
    """SHA-256 of what must be equal."""
    events = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    found = {
        "losses": repr([(e["step"], e["loss"], e["grad_norm"]) for e in events if e["event"] == "step"]).encode(),
        "held out": repr([(e["step"], e["loss"]) for e in events if e["event"] == "eval"]).encode(),
        "trained": (root / f"checkpoints/step-{steps}/trained.safetensors").read_bytes(),
        "method": (root / f"checkpoints/step-{steps}/method.safetensors").read_bytes(),
    }
    for path in sorted(root.glob("adapter/*.safetensors")) + sorted(root.glob("model/*.safetensors")):
        found[path.name] = path.read_bytes()
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def torture(name: str, asked: argparse.Namespace) -> bool:
    """Kill one method's runs; whether every one of them ended as the untouched one."""
    kills, steps, seed, every, full = asked.kills, asked.steps, asked.seed, asked.every_operation, asked.full_disk
    together = {"processes": asked.processes, "engine": asked.engine}
    chance = random.Random(f"{seed}/{name}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)

        def recipe(run: str) -> Any:
            return tiny.recipe(
                where,
                name,
                training={"max_steps": steps, "gradient_accumulation_steps": max(1, 2 // asked.processes)},
                method={"dropout": 0.1} if name in ("lora", "adalora", "qlora") else {},
                checkpoint={"every_steps": 4, "keep": 2},
                evaluation={"every_steps": 3},
                output_dir=str(where / run),
            )

        before = time.monotonic()
        # Of each process, for one that only reads has other operations than the one that writes.
        untouched = [fork(recipe(f"whole-{rank}"), **together, victim=rank) for rank in range(asked.processes)]
        whole = (time.monotonic() - before) / asked.processes
        assert not any(status for status, _ in untouched), f"{name}: the untouched run failed"
        operations = untouched[0][1]
        expected = fingerprint(where / "whole-0", steps)
        killed = runs = attempts = 0
        planned = list(range(1, operations + 1)) if every else None
        good = True
        while killed < kills if planned is None else planned:
            runs += 1
            loaded = recipe(f"run-{runs}")
            root = Path(loaded.recipe.output_dir)
            while not finished(root):
                attempts += 1
                victim = 0 if planned is not None else chance.randrange(asked.processes)
                if planned is not None:
                    # Each operation of a run from its beginning; what comes after the kill is one plain resumption.
                    at, after = (planned.pop(0) if planned and not root.exists() else 0), None
                elif killed >= kills:
                    at, after = 0, None
                elif full or (untouched[victim][1] and chance.random() < 0.5):
                    at, after = chance.randint(1, untouched[victim][1]), None
                else:
                    at, after = 0, chance.uniform(0, whole)
                grace = chance.uniform(0, 1)
                status, _ = fork(loaded, **together, at=at, full=full, after=after, victim=victim, grace=grace)
                if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (1, 2):
                    killed += 1
                elif status:
                    print(f"{name}: attempt {attempts} of run {runs} failed with {os.WEXITSTATUS(status)}")
                    return False
                left = root / "run.json"
                if left.exists():
                    json.loads(left.read_text())
            found = fingerprint(root, steps)
            if found != expected:
                good = False
                print(f"{name}: run {runs} differs: {sorted(k for k in expected if found.get(k) != expected[k])}")
        what = "full disks" if full else "kills"
        if asked.processes > 1:
            what += f" of one of {asked.processes} processes"
        print(
            f"{name:10} {killed} {what}, {runs} runs of {steps} steps, {operations} file operations in one, "
            f"{time.monotonic() - began:.0f} s: {'all equal' if good else 'DIFFERENT'} "
            f"(trained {expected['trained'][:16]}, losses {expected['losses'][:16]})",
            flush=True,
        )
        return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--methods", nargs="+", default=["lora", "adalora", "galore", "qlora", "full"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-operation", action="store_true", help="kill once at each file operation of a run")
    parser.add_argument("--full-disk", action="store_true", help="fill the disk instead of killing")
    parser.add_argument("--processes", type=int, default=1, help="that share a run; one of them is killed")
    parser.add_argument("--engine", choices=["ddp", "fsdp2"], help="how they share it (default: ddp)")
    asked = parser.parse_args()
    if asked.full_disk and asked.processes > 1:
        parser.error("--full-disk fills the disk of one process")
    results = [torture(name, asked) for name in asked.methods]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
