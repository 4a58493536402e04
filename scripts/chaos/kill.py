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
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
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


def attempt(loaded: Any, at: int, full: bool, done: int) -> int:
    """Train or resume in a forked process; its exit code. Writes the number of file operations to ``done``."""
    root = Path(loaded.recipe.output_dir)
    faults = Faults(root, at, full=full)
    try:
        train(loaded, resume=root.exists(), progress=False)
    except RunFailed as error:
        if not full or "No space left" not in str(error):
            print(error.render(), file=sys.stderr)
            return 3
        return 1
    except FtuneError as error:
        # A full disk before the run began is the user's to mend.
        if full and "No space left" in str(error):
            return 2
        print(error.render(), file=sys.stderr)
        return 3
    os.write(done, f"{faults.count}\n".encode())
    return 0


def fork(loaded: Any, *, at: int = 0, full: bool = False, after: float | None = None) -> tuple[int, int]:
    """One attempt: wait status, and the number of its file operations where it came to its end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 4
        try:
            sys.stderr = sys.stderr if os.environ.get("CHAOS_LOUD") else open(os.devnull, "w")  # noqa: SIM115
            code = attempt(loaded, at, full, writing)
        except BaseException:
            import traceback

            traceback.print_exc(file=sys.__stderr__)
        os._exit(code)
    os.close(writing)
    if after is not None and not select.select([reading], [], [], after)[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    text = os.read(reading, 64)
    os.close(reading)
    return status, int(text or 0)


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


def torture(name: str, kills: int, steps: int, seed: int, every: bool, full: bool) -> bool:
    """Kill one method's runs; whether every one of them ended as the untouched one."""
    chance = random.Random(f"{seed}/{name}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)

        def recipe(run: str) -> Any:
            return tiny.recipe(
                where,
                name,
                training={"max_steps": steps, "gradient_accumulation_steps": 2},
                method={"dropout": 0.1} if name in ("lora", "adalora", "qlora") else {},
                checkpoint={"every_steps": 4, "keep": 2},
                evaluation={"every_steps": 3},
                output_dir=str(where / run),
            )

        start = time.monotonic()
        status, operations = fork(recipe("whole"))
        whole = time.monotonic() - start
        assert status == 0, f"{name}: the untouched run failed"
        expected = fingerprint(where / "whole", steps)
        killed = runs = attempts = 0
        planned = list(range(1, operations + 1)) if every else None
        good = True
        while killed < kills if planned is None else planned:
            runs += 1
            loaded = recipe(f"run-{runs}")
            root = Path(loaded.recipe.output_dir)
            while not finished(root):
                attempts += 1
                if planned is not None:
                    # Each operation of a run from its beginning; what comes after the kill is one plain resumption.
                    at, after = (planned.pop(0) if planned and not root.exists() else 0), None
                elif killed >= kills:
                    at, after = 0, None
                elif full or chance.random() < 0.5:
                    at, after = chance.randint(1, operations), None
                else:
                    at, after = 0, chance.uniform(0, whole)
                status, _ = fork(loaded, at=at, full=full, after=after)
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
    asked = parser.parse_args()
    results = [
        torture(name, asked.kills, asked.steps, asked.seed, asked.every_operation, asked.full_disk)
        for name in asked.methods
    ]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
