"""Train the same model on the same examples with ftune and with other tools, and compare time and memory.

Every peer gets an environment of its own under ``build/bench``. First each tool makes one update on one batch, and
its loss must be the one of the plain path, else it is not timed. Then all tools train in turns, as whole processes,
so that what else the machine does burdens them alike; a ratio is always one of neighbours in the same round.

    python scripts/bench/run.py                                   # every tool that runs on this machine's CPU
    python scripts/bench/run.py --peers trl --tools ftune --pairs 1
    python scripts/bench/run.py --device cuda --model DIRECTORY   # the same on a GPU, with the peers that need one
    python scripts/bench/run.py --isa avx2                        # as on a CPU without newer instructions

All tools compute in the dtype in which this device multiplies faster, as measured, unless ``--dtype`` names one. The
figures of bfloat16 go to docs/figures/benchmarks.json, those of float32 to docs/figures/benchmarks_fp32.json, the page
of both to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import environments
import measure
import report
import work
from job import ALPHA, RANK, Job, Tool
from ours import OURS
from peers import ABSENT, PEERS

TOLERANCE = {"bfloat16": 0.01, "float32": 0.001}  # of a loss against the one expected, which is in fp32
TIMEOUT_SECONDS = 1800.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help=f"of {', '.join(PEERS)}; default: all that the device allows")
    parser.add_argument("--tools", default=",".join(OURS), help="variants of ftune")
    parser.add_argument("--pairs", type=int, default=3, help="rounds; each tool trains once in each (default 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=measure.physical_cores(), help="default: physical cores")
    parser.add_argument("--model", type=Path, help="a directory of safetensors; default: the quickstart's model")
    parser.add_argument("--micro-batch", type=int, help="examples in a forward pass; default 1, on a GPU a batch")
    parser.add_argument("--directory", type=Path, default=work.ROOT / "build/bench", help="environments and runs")
    parser.add_argument("--dtype", choices=["auto", *report.FIGURES], default="auto", help="default: as measured")
    parser.add_argument("--isa", choices=list(environments.ISAS), help="use no newer instructions of this CPU")
    parser.add_argument("--shared", action="store_true", help="other work is on this machine: the page gives no times")
    parser.add_argument("--figures", type=Path, help="default: those of the dtype under docs/figures")
    parser.add_argument("--check-only", action="store_true", help="compare the losses, time nothing")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> dict[str, Tool]:
    """The tools of this run in the order of a round: ftune and the peers alternate."""
    cuda = args.device == "cuda"
    names = args.peers.split(",") if args.peers else [n for n, peer in PEERS.items() if cuda or not peer.cuda_only]
    unknown = [name for name in [*names, *args.tools.split(",")] if name not in PEERS | OURS]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(OURS | PEERS)}")
    order = itertools.zip_longest(args.tools.split(","), names)
    return {name: (OURS | PEERS)[name] for pair in order for name in pair if name is not None}


class Bench:
    """One comparison: where its files are, and how a tool is run once."""

    def __init__(self, args: argparse.Namespace, tools: dict[str, Tool]) -> None:
        self.args, self.tools, self.cuda = args, tools, args.device == "cuda"
        self.micro = args.micro_batch or (work.BATCH if self.cuda else 1)
        self.directory: Path = args.directory.resolve()
        self.dtype: str = args.dtype
        if self.dtype == "auto":
            self.dtype = work.best_dtype(args.device, self._environment())
        print(f"every tool computes in {self.dtype}", flush=True)
        self.model: Path = (
            args.model.resolve()
            if args.model
            else work.export_model(self.directory / self.dtype / work.MODEL, self.dtype)
        )
        self.figures: Path = args.figures or report.FIGURES[self.dtype]
        self.data = self.directory / "data"
        work.write_data(self.data)
        self.bins = {name: environments.build(tool, self.directory / name, self.cuda) for name, tool in tools.items()}

    def expected(self) -> dict[str, Any]:
        """The losses of the plain path, and the tokens of the work."""
        script = Path(__file__).with_name("reference.py")
        files = [str(self.data / f"{split}.messages.jsonl") for split in ("check", "train")]
        done = subprocess.run(
            [sys.executable, str(script), str(self.model), *files],
            env=os.environ | self._environment(),
            stdout=subprocess.PIPE,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def train(self, name: str, split: str, updates: int, run: str) -> dict[str, Any]:
        """Train with one tool once, measured."""
        tool, out = self.tools[name], self.directory / "runs" / f"{run}-{name}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        sizes = work.BATCH, self.micro, work.MAX_LENGTH
        job = Job(self.model, self.data, split, updates, *sizes, self.cuda, out, self.dtype)
        command = tool.configure(job, self.bins[name])
        load = os.getloadavg()[0]
        measured = measure.run(command, self._environment(), out / "log.txt", TIMEOUT_SECONDS, self.cuda)
        phase = tool.read(job, (out / "log.txt").read_text(encoding="utf-8", errors="replace").replace("\r", "\n"))
        print(
            f"{run} {name}: {measured.wall_seconds:.1f} s, of it {phase.seconds:.1f} s training,",
            f"loss {phase.first_loss:.4f}, {measured.peak_bytes / 2**20:.0f} MiB, load before {load:.1f}",
            flush=True,
        )
        return {"tool": name, "training_seconds": phase.seconds, "first_loss": phase.first_loss} | asdict(measured)

    def check(self, expected: dict[str, Any]) -> dict[str, Any]:
        """Hold every tool's first loss against the plain path's; those that differ or fail are not timed."""
        checked: dict[str, Any] = {}
        for name, tool in self.tools.items():
            mean, span = tool.loss
            entry = {"mean": mean, "span": span, "tokens": expected[span]["tokens"], "expected": expected[span][mean]}
            try:
                entry["loss"] = self.train(name, "check", tool.check_updates, "check")["first_loss"]
                entry["agrees"] = abs(entry["loss"] / entry["expected"] - 1) <= TOLERANCE[self.dtype]
            except (measure.ProcessFailed, LookupError) as error:
                print(error, file=sys.stderr)
                entry |= {"loss": None, "agrees": False}
            checked[name] = entry
            print(f"{name}: expected {entry['expected']:.4f}: {'agrees' if entry['agrees'] else 'DIFFERS'}", flush=True)
        return checked

    def _environment(self) -> dict[str, str]:
        return environments.variables(self.directory, self.args.threads, self.cuda, self.args.isa)

    def facts(self, expected: dict[str, Any], checked: dict[str, Any]) -> dict[str, Any]:
        """Everything that the page says beside the runs."""
        later = {peer.title: peer.note for peer in PEERS.values() if peer.cuda_only and not self.cuda}
        return {
            "date": datetime.date.today().isoformat(),
            "device": measure.device_name(self.cuda),
            "cuda": self.cuda,
            "threads": self.args.threads,
            "dtype": self.dtype,
            "isa": self.args.isa,
            "shared": self.args.shared,
            "model": self.model.name,
            "micro_batch": self.micro,
            "work": expected["train"] | {"updates": work.UPDATES, "batch": work.BATCH, "rank": RANK, "alpha": ALPHA},
            "tools": {
                name: {"title": tool.title, "note": tool.note, "versions": environments.versions(self.bins[name])}
                for name, tool in self.tools.items()
            },
            "check": checked,
            "absent": ABSENT | {title: f"{note}; `--device cuda` takes it in" for title, note in later.items()},
        }

    def rounds(self, names: list[str]) -> Iterator[list[dict[str, Any]]]:
        """All runs so far, after each round."""
        runs = []
        for index in range(self.args.pairs):
            # Every other round runs backwards, so that a machine which slows down favours nobody.
            for name in names if index % 2 == 0 else names[::-1]:
                runs.append({"round": index} | self.train(name, "train", work.UPDATES, f"round{index}"))
            yield runs


def main() -> None:
    args = parse()
    tools = chosen(args)
    bench = Bench(args, tools)
    expected = bench.expected()
    checked = bench.check(expected["check"])
    agreeing = [name for name, entry in checked.items() if entry["agrees"]]
    if not args.check_only:
        for runs in bench.rounds(agreeing):
            figures = bench.facts(expected, checked) | {"runs": runs}
            bench.figures.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            if bench.figures in report.FIGURES.values():
                report.write_page()
    if len(agreeing) < len(tools):
        raise SystemExit(f"not timed, their loss differs: {', '.join(sorted(set(tools) - set(agreeing)))}")


if __name__ == "__main__":
    main()
