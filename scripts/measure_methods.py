"""Train every method's recipe on the real model, each beside LoRA, and keep the figures for docs/methods.md.

Step time and peak memory are ratios against LoRA: while a method trains, a second process trains LoRA's recipe, and
the two take turns, one update each, so that whatever else the machine does burdens both alike. The loop is the one
of ``ftune train``; it waits inside the sink that receives its events, outside of what it times.

Usage::

    python scripts/measure_methods.py [--methods lora,dora] [--pairs 8] [--out docs/figures/methods.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ftune.heap import tuned
from ftune.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
YARDSTICK = "lora"
WARM_UP = 2  # updates of each process that are not timed: kernels are compiled, memory is first touched


def worker(recipe: str, overrides: list[str]) -> None:
    """Train a recipe, waiting for a line on standard input before every update."""
    from ftune.artifacts.training import train
    from ftune.recipe import load_checked
    from ftune.run.events import Event, RunStart, StepEnd

    protocol = sys.stdout
    sys.stdout = sys.stderr

    class TakeTurns:
        def receive(self, event: Event) -> None:
            if isinstance(event, StepEnd):
                print(json.dumps({"seconds": event.seconds, "peak": event.peak_bytes}), file=protocol, flush=True)
            if isinstance(event, RunStart) or (isinstance(event, StepEnd)):
                sys.stdin.readline()

        def close(self) -> None:
            pass

    record = train(load_checked(Path(recipe), overrides)[0], overwrite=True, progress=False, sinks=[TakeTurns()])
    print(json.dumps({"record": record}), file=protocol, flush=True)


class Turn:
    """A worker process that makes one update at a time."""

    def __init__(self, name: str, model: Path, out: Path, extra: list[str]) -> None:
        overrides = [f"model.id={model}", f"output_dir={out}", *extra]
        command = [sys.executable, __file__, "--worker", f"recipes/{name}.yaml", *overrides]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=tuned(os.environ),  # as `ftune train` begins
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def step(self) -> dict[str, Any]:
        """Let it make one update; at the end of its run, the record."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(self._process.stderr.read())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def finish(self) -> dict[str, Any]:
        """Make the updates that are left; returns the run's record."""
        while "record" not in (answer := self.step()):
            pass
        self._process.wait()
        record: dict[str, Any] = answer["record"]
        return record

    def stop(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


def dense(where: Path) -> Path:
    """The recipes' model as an ordinary directory, which loads in a second where GGUF takes twenty."""
    import torch

    from ftune.methods.lora import Lora
    from ftune.plan.base_model import load_base, load_tokenizer
    from ftune.recipe import load_checked

    spec = load_checked(ROOT / "recipes" / f"{YARDSTICK}.yaml")[0].recipe.model
    model: Any = load_base(spec, Lora(), torch.bfloat16, torch.device("cpu"))
    model.save_pretrained(where)
    load_tokenizer(spec).save_pretrained(where)
    return where


def measure(name: str, model: Path, scratch: Path, pairs: int, extra: list[str]) -> dict[str, Any]:
    """Train one method beside LoRA; its figures."""
    run = scratch / name
    mine = Turn(name, model, run, extra)
    ratios, peaks = [], []
    if name != YARDSTICK:
        other = Turn(YARDSTICK, model, scratch / "yardstick", extra)
        for pair in range(WARM_UP + pairs):
            a, b = mine.step(), other.step()
            if pair >= WARM_UP:
                ratios.append(a["seconds"] / b["seconds"])
                peaks = [a["peak"], b["peak"]]
        other.stop()
    record = mine.finish()
    plan, measured = record["plan"], record["measured"]
    row = {
        "method": name,
        "settings": plan["method"]["settings"],
        "learning_rate": plan["training"]["learning_rate"],
        "trainable": plan["method"]["trainable"],
        "share": plan["method"]["share"],
        "steps": measured["steps"],
        "held_out_loss": measured["held_out_loss"],
        "peak_bytes": measured["peak_bytes"],
        "predicted_over_measured": measured["predicted_over_measured"],
        "step_time_ratio": statistics.median(ratios) if ratios else 1.0,
        "step_time_spread": [min(ratios), max(ratios)] if ratios else [1.0, 1.0],
        "peak_ratio": peaks[0] / peaks[1] if peaks else 1.0,
        "saved_bytes": sum(file.stat().st_size for file in (run / plan["method"]["artifact"]).glob("*.safetensors")),
        "vitals_line": record["vitals_line"],
        "merge_error": None,
    }
    if METHODS[name].mergeable:
        done = subprocess.run(
            [sys.executable, "-m", "ftune", "merge", str(run), "--dtype", "float32", "--json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        row["merge_error"] = json.loads(done.stdout)["merged_vs_adapter"]["max_error"]
    shutil.rmtree(run)
    return row


def base_loss(model: Path) -> float:
    """Held-out loss of the base model."""
    done = subprocess.run(
        [sys.executable, "-c", _BASE_LOSS, str(model)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout.strip().splitlines()[-1])


_BASE_LOSS = """
import sys
from pathlib import Path
from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.tuned import Target
from ftune.recipe import load_checked
recipe = load_checked(Path("recipes/lora.yaml"), [f"model.id={sys.argv[1]}", "evaluation.metrics=[]"])[0].recipe
print(evaluate(Target(recipe, None), base=True)["base"]["loss"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--set", action="append", default=[], help="change every recipe: training.max_steps=12")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures/methods.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker[0], arguments.worker[1:])
        return
    from ftune.artifacts.run_dir import package_versions

    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"rows": {}}
    with tempfile.TemporaryDirectory() as scratch:
        model = dense(Path(scratch) / "model")
        known["base_loss"] = base_loss(model)
        known["versions"] = package_versions()
        known["machine"] = platform.machine()
        for name in arguments.methods.split(","):
            row = known["rows"][name] = measure(name, model, Path(scratch), arguments.pairs, arguments.set)
            print(
                f"{name:11} trainable {row['trainable']:>11,}  held-out {row['held_out_loss']:.3f}  "
                f"time x {row['step_time_ratio']:.2f}  peak x {row['peak_ratio']:.2f}  merge {row['merge_error']}",
                flush=True,
            )
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
