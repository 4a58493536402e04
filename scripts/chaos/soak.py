"""Train thousands of steps and hold that memory and open files stay flat.

    python scripts/chaos/soak.py --steps 10000

A tiny random Llama, LoRA, fp32 on the CPU, with checkpoints and evaluations on the way. Resident memory and open files
of the process are sampled from outside. The first fifth is warm-up (libraries load, the heap finds its size); after it,
the medians of the first and the last quarter of the samples are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
for place in (HERE.parents[1] / "tests", HERE.parents[1]):
    sys.path.insert(0, str(place))

import tiny  # noqa: E402

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--growth-mib", type=float, default=8.0, help="most that resident memory may grow")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        loaded = tiny.recipe(
            where,
            asked.method,
            training={"max_steps": asked.steps, "gradient_accumulation_steps": 2},
            optimizer={"learning_rate": 1e-3},
            checkpoint={"every_steps": max(1, asked.steps // 50)},
            evaluation={"every_steps": max(1, asked.steps // 50)},
        )
        (where / "recipe.yaml").write_text(loaded.text)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ftune", "train", str(where / "recipe.yaml")]
        with (where / "log").open("w") as log:
            run = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        samples = watch(psutil.Process(run.pid), run, where / "run/metrics.jsonl")
        if run.returncode:
            sys.exit((where / "log").read_text())
    samples = [sample for sample in samples if sample[0] >= asked.steps // 5]
    if len(samples) < 20:
        sys.exit(f"only {len(samples)} samples: take more steps")
    quarter = len(samples) // 4
    grown = []
    for index, unit in ((1, MIB), (2, 1)):
        first, last = (
            statistics.median(sample[index] for sample in part) / unit
            for part in (samples[:quarter], samples[-quarter:])
        )
        grown.append(last - first)
        what = "resident, MiB" if index == 1 else "open files"
        print(f"{what:14} {first:9.1f} -> {last:9.1f}   grew by {last - first:+.1f}, from step {samples[0][0]} on")
    sys.exit(0 if grown[0] <= asked.growth_mib and grown[1] <= 0 else 1)


def watch(process: psutil.Process, run: subprocess.Popen[bytes], metrics: Path) -> list[tuple[int, int, int]]:
    """(step, resident bytes, open files), a few times a second, until the run ends."""
    samples: list[tuple[int, int, int]] = []
    while run.poll() is None:
        time.sleep(0.25)
        try:
            samples.append((last_step(metrics), process.memory_info().rss, process.num_fds()))
        except psutil.NoSuchProcess:
            break
    run.wait()
    return samples


def last_step(metrics: Path) -> int:
    """The step of the last whole line, read from the end of the file."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        steps = [line.split(b'"step": ')[1].split(b",")[0] for line in file if line.startswith(b'{"event": "step"')]
    return int(steps[-1]) if steps else 0


if __name__ == "__main__":
    main()
