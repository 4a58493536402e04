"""How long ``ftune train`` takes to its first step, against importing its libraries and loading the weights.

    python scripts/bench/startup.py [PAIRS]

Both start as fresh processes, in turns, on the quickstart's model in the dtype that ``auto`` is on this device; one
pair before the measured ones fills ftune's cache and the system's. CPU seconds are those of all threads (Linux only):
other work on the machine disturbs them less than wall time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

BARE = """
import sys
import torch, transformers, accelerate, peft
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print("loaded", flush=True)
sys.stdin.read()
"""

Seconds = tuple[float, float]
"""Wall and CPU time of a process."""


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _until(arguments: list[str], reached: Callable[[subprocess.Popen[bytes]], bool]) -> Seconds:
    """Time of a process up to a point, at which it is ended."""
    began = time.perf_counter()
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        while not reached(process):
            if process.poll() is not None:
                raise RuntimeError(process.communicate()[1].decode())
            time.sleep(0.005)
        return time.perf_counter() - began, _cpu(process.pid)
    finally:
        process.kill()
        process.communicate()


def bare(model: Path, dtype: str) -> Seconds:
    """Import what a LoRA run uses, and load the weights."""

    def loaded(process: subprocess.Popen[bytes]) -> bool:
        assert process.stdout is not None
        return process.stdout.readline() == b"loaded\n"

    return _until([sys.executable, "-c", BARE, str(model), dtype], loaded)


def to_first_step(model: Path, run: Path, dtype: str) -> Seconds:
    """Run the quickstart's recipe on that model, until the first step begins."""
    metrics = run / "metrics.jsonl"
    settings = [f"model.id={model}", f"model.dtype={dtype}", f"output_dir={run}"]
    command = [sys.executable, "-m", "ftune", "train", "recipes/quickstart.yaml"]
    for setting in settings:
        command += ["--set", setting]
    return _until(command, lambda _: metrics.is_file() and metrics.stat().st_size > 0)


def table(pairs: list[tuple[Seconds, Seconds]]) -> str:
    """Medians, and the ratio with its spread over the pairs."""
    lines = ["| start-up | imports and weights | ftune to its first step | ratio (spread) |", "|---|---|---|---|"]
    for index, what in enumerate(("wall", "CPU")):
        ours, theirs = [ftune[index] for _, ftune in pairs], [bare[index] for bare, _ in pairs]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {what} | {statistics.median(theirs):.1f} s | {statistics.median(ours):.1f} s | {middle} |")
    return "\n".join(lines)


def measure(model: Path, pairs: int, dtype: str) -> list[tuple[Seconds, Seconds]]:
    """Bare and ftune in turns; the first pair is not counted.

    Args:
        model: A directory with the weights in bfloat16.
        pairs: How many to count.
        dtype: What both compute in.
    """
    with tempfile.TemporaryDirectory() as scratch:
        timed = [
            (bare(model, dtype), to_first_step(model, Path(scratch) / str(pair), dtype)) for pair in range(pairs + 1)
        ]
    return timed[1:]


def main() -> None:
    """Measure and print the table."""
    from work import MODEL, best_dtype, export_model

    pairs, dtype = int(sys.argv[1]) if len(sys.argv) > 1 else 3, best_dtype()
    with tempfile.TemporaryDirectory() as scratch:
        print(dtype, table(measure(export_model(Path(scratch) / MODEL, dtype), pairs, dtype)), sep="\n\n")


if __name__ == "__main__":
    main()
