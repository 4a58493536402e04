"""Train an 8B shape on a GPU with every method at 2k, 8k and 32k tokens a row, beside other tools.

    python scripts/bench/gpu.py                                        # everything; goes on where it was stopped
    python scripts/bench/gpu.py --methods lora longlora s2 --lengths 8192 --peers none
    python scripts/bench/gpu.py --device cpu --sizes DIRECTORY --lengths 64 --methods lora   # to try it out

The weights are random (``random_model.py``), since neither time nor memory depends on them. Every case is one process
of ``ftune train`` on rows of exactly so many tokens: one document a row, and for LoRA packed rows of four as well. A
peer trains the same rows directly after ftune. A peer runs without gradient checkpointing first, and with it where it
runs out of memory; ftune decides for itself (``auto``). A case that fails or runs out of memory is a result like any
other. The figures are written after every case, and what they hold already is not run again (``--again`` does); cases
that failed are.

The figures go to docs/figures/gpu.json, the page to docs/benchmarks.md. The model takes 2 bytes a parameter in
build/bench, and a run of GaLore, which saves the whole model, 8 bytes a parameter more (``--runs`` elsewhere).
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import environments
import gpu_peers
import measure
import report
import work
import yaml
from gpu_cases import BATCH, METHODS, Case, cases, failure, planned, read_run, recipe, write_rows
from job import ALPHA, RANK, Job
from random_model import WORDS
from run import TOLERANCE

OURS = "ftune"
SIZES = work.ROOT / "ftune/shapes/llama-3-8b"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=Path, default=SIZES, help="a directory with a config.json")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768], help="tokens in a row")
    parser.add_argument("--peers", default=",".join(gpu_peers.TOOLS), help="separated by commas, or none")
    parser.add_argument(
        "--updates",
        type=int,
        default=4,
        help="of each run (short rows: times 8); the second half counts (default 4)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--threads", type=int, default=measure.physical_cores(), help="default: physical cores")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that a run may take")
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="PEER=PATH",
        help="interpreters that have a peer already, for a machine without a package index; nothing is installed",
    )
    parser.add_argument(
        "--tokenizer", default=work.GGUF, help="the model's, as a recipe's model.id (default: %(default)s)"
    )
    parser.add_argument("--directory", type=Path, default=work.ROOT / "build/bench", help="model and environments")
    parser.add_argument("--runs", type=Path, help="where runs write; default: in the directory")
    parser.add_argument("--figures", type=Path, help="default: docs/figures/gpu.json; on a CPU, in the directory")
    parser.add_argument("--again", action="store_true", help="run the chosen cases even if the figures have them")
    args = parser.parse_args(argv)
    args.peers = [] if args.peers == "none" else args.peers.split(",")
    args.python = {name: Path(path).absolute() for name, path in (given.split("=", 1) for given in args.python)}
    if unknown := [name for name in args.peers if name not in gpu_peers.TOOLS]:
        parser.error(f"unknown peers: {', '.join(unknown)}; there are {', '.join(gpu_peers.TOOLS)}")
    if others := [str(path) for path in args.python.values() if path.name != "python"]:
        parser.error(f"--python: {', '.join(others)}: an interpreter named `python`, in a directory of its own")
    if args.updates < 2:
        parser.error("--updates: the first half is not counted, so there must be two")
    if args.device == "cuda" and shutil.which("nvidia-smi") is None:
        parser.error("there is no nvidia-smi, so no GPU to measure on; --device cpu tries the script out")
    return args


class Bench:
    """The measurement: where its files are, how a case is run once, and what is known so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.cuda = args, args.device == "cuda"
        self.root: Path = args.directory.resolve()
        self.directory = self.root / "gpu"
        self.runs = (args.runs or self.directory / "runs").resolve()
        self.figures: Path = args.figures or (report.GPU if self.cuda else self.directory / "gpu.json")
        self.variables = environments.variables(self.root, args.threads, self.cuda)
        self.model = self.directory / f"{args.sizes.resolve().name}-random"
        self.facts = self._write_model()
        self.dtype = work.best_dtype(args.device, self.variables)
        self.words = json.loads((self.model / WORDS).read_text(encoding="utf-8"))
        self.bins: dict[str, Path] = {}
        self.absent: dict[str, str] = {}
        self._build_peers()
        self.header = self._header()
        self.results = self._earlier()
        # Where a peer has run out of memory once, longer rows begin with gradient checkpointing.
        self.checkpointing: set[tuple[str, str]] = set()

    def _write_model(self) -> dict[str, Any]:
        """In a process of its own: a child's peak counts from its parent's, so this one must stay small."""
        script = str(Path(__file__).with_name("random_model.py"))
        context = str(max(self.args.lengths))
        command = [
            sys.executable,
            script,
            str(self.args.sizes.resolve()),
            str(self.model),
            context,
            self.args.tokenizer,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return facts

    def _build_peers(self) -> None:
        for name in self.args.peers:
            tool = gpu_peers.TOOLS[name]
            if tool.cuda_only and not self.cuda:
                self.absent[tool.title] = tool.note
                continue
            if name in self.args.python:
                self.bins[name] = self.args.python[name].parent
                continue
            try:
                self.bins[name] = environments.build(tool, self.directory / name, self.cuda)
            except (subprocess.CalledProcessError, SystemExit) as error:
                print(f"{tool.title} is left out: {error}", file=sys.stderr)
                self.absent[tool.title] = "its packages could not be installed here"

    def _header(self) -> dict[str, Any]:
        """What all results of one file of figures have in common."""
        return {
            "device": measure.device_name(self.cuda),
            "cuda": self.cuda,
            "model": {"name": self.args.sizes.resolve().name} | self.facts,
            "work": {"updates": self.args.updates, "batch": BATCH, "rank": RANK, "alpha": ALPHA},
        }

    def _earlier(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Results of a run that was stopped, where they are of the same device, model and work."""
        if not self.figures.exists():
            return {}
        found = json.loads(self.figures.read_text(encoding="utf-8"))
        if any(found[key] != value for key, value in self.header.items()):
            raise SystemExit(f"{self.figures} has results of another device, model or work: move it away")
        self.absent = {
            title: why for title, why in found["absent"].items() if title not in self._titles()
        } | self.absent
        return {(result["tool"], Case(**result["case"]).key): result for result in found["results"]}

    def _titles(self) -> set[str]:
        return {gpu_peers.TOOLS[name].title for name in self.bins}

    def plan(self) -> Iterator[tuple[str, Case]]:
        """Every run in its order: ftune, and behind it the peers on the same rows."""
        for case in cases(self.args.methods, self.args.lengths, self.cuda and find_spec("flash_attn") is not None):
            yield OURS, case
            if case.has_peers:
                for peer in self.bins:
                    yield peer, case

    def is_known(self, tool: str, case: Case) -> bool:
        """Whether the figures have this result; a failure is not one."""
        result = self.results.get((tool, case.key))
        return not self.args.again and result is not None and result["status"] != "failed"

    def measure(self, tool: str, case: Case) -> dict[str, Any]:
        """Train one case with one tool; what it ends with is a result, whatever it is."""
        if tool == OURS:
            result = self._attempt(tool, case)
            if result["status"] == "out of memory" and result.get("recomputed_blocks", 0) < result.get("blocks", 0):
                # The plan was wrong, which is a result; what the case takes with all blocks recomputed is another.
                return self._attempt(tool, case, checkpointing=True) | {"auto": result["status"]}
            return result
        known = (tool, case.method)
        if known not in self.checkpointing:
            result = self._attempt(tool, case, checkpointing=False)
            if result["status"] != "out of memory":
                return result
            self.checkpointing.add(known)
        return self._attempt(tool, case, checkpointing=True)

    def _attempt(self, tool: str, case: Case, checkpointing: bool | None = None) -> dict[str, Any]:
        out = self.runs / f"{tool}-{case.key}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        rows, log = out / "rows.jsonl", out / "log.txt"
        updates = case.updates(self.args.updates)
        write_rows(rows, self.words, case, updates)
        result: dict[str, Any] = {"tool": tool, "case": asdict(case), "checkpointing": checkpointing}
        try:
            command = self._command(tool, case, updates, bool(checkpointing), rows, out)
            measured = measure.run(command, self.variables, log, self.args.timeout, self.cuda)
            text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
            said = read_run(out / "run", case) if tool == OURS else gpu_peers.read(text, case, self.cuda)
            # On a CPU a peer has no allocator to ask: its peak is that of the process.
            result |= {"status": "ok", "peak_bytes": measured.peak_bytes} | said
            result |= {"device_peak_bytes": measured.device_peak_bytes, "wall_seconds": measured.wall_seconds}
        except measure.ProcessFailed as error:
            # The last line says how it ended and after how long, which is all there is of a run out of time.
            status, reason = failure(log.read_text(encoding="utf-8", errors="replace"), str(error).splitlines()[-1])
            result |= {"status": status, "reason": self._clean(reason)} | planned(out / "run")
        except (LookupError, OSError, ValueError) as error:
            result |= {"status": "failed", "reason": self._clean(f"{type(error).__name__}: {error}")}
        # Weights and checkpoints of one run would fill the disk before the last one.
        shutil.rmtree(out / "run", ignore_errors=True)
        return result

    def _command(self, tool: str, case: Case, updates: int, checkpointing: bool, rows: Path, out: Path) -> list[str]:
        if tool == OURS:
            hidden = self.facts["sizes"]["hidden_size"]
            settings = recipe(case, self.model, rows, updates, hidden, out / "run", checkpointing, self.dtype)
            path = out / "recipe.yaml"
            path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
            return [sys.executable, "-m", "ftune", "train", str(path)]
        job = Job(self.model, out, rows.stem, updates, BATCH, 1, case.length, self.cuda, out, self.dtype)
        return gpu_peers.command(tool, case, checkpointing, job, rows, self.bins[tool])

    def _clean(self, text: str) -> str:
        """Without the names of this machine's directories."""
        for path in (self.runs, self.root, work.ROOT, Path(sys.prefix), Path.home()):
            text = text.replace(f"{path}/", "")
        return text[:300]

    def keep(self, result: dict[str, Any]) -> None:
        """Take a result in and write the figures, and the page where they are its figures."""
        case = Case(**result["case"])
        ours = self.results.get((OURS, case.key), {})
        if result["tool"] != OURS and result["status"] == "ok" and "first_loss" in ours:
            same = abs(result["first_loss"] / ours["first_loss"] - 1) <= TOLERANCE
            result["agrees"] = same and result["trainable"] == ours["trainable"]
        self.results[result["tool"], case.key] = result
        tools = {OURS: {"title": OURS, "versions": environments.versions(Path(sys.executable).parent)}} | {
            name: {"title": gpu_peers.TOOLS[name].title, "versions": environments.versions(path)}
            for name, path in self.bins.items()
        }
        if self.figures.exists():
            tools = json.loads(self.figures.read_text(encoding="utf-8"))["tools"] | tools
        figures = {"date": datetime.date.today().isoformat()} | self.header
        figures |= {"tools": tools, "absent": self.absent, "results": list(self.results.values())}
        self.figures.parent.mkdir(parents=True, exist_ok=True)
        self.figures.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        if self.figures == report.GPU:
            report.write_page()


def shown(result: dict[str, Any]) -> str:
    """A result in a line."""
    if result["status"] != "ok":
        return f"{result['status']}: {result['reason']}"
    line = f"{result['tokens_per_second']:,.0f} tokens/s, peak {result['peak_bytes'] / 2**30:.2f} GiB"
    line += f", loss {result['first_loss']:.4f}"
    return line + (", another loss or other parameters than ftune's" if result.get("agrees") is False else "")


def main(argv: list[str] | None = None) -> None:
    bench = Bench(parse(argv))
    for tool, case in bench.plan():
        if bench.is_known(tool, case):
            print(f"{tool} {case.key}: known", flush=True)
            continue
        result = bench.measure(tool, case)
        bench.keep(result)
        print(f"{tool} {case.key}: {shown(result)}", flush=True)
    print(f"figures: {bench.figures}")


if __name__ == "__main__":
    main()
