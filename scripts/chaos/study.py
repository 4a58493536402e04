"""Kill -9 a study at random times, go on with it each time, and compare its end with that of one nobody touched.

    python scripts/chaos/study.py --kills 10

The study is of two methods on a tiny random Llama on the CPU, 3 learning rates and 2 seeds each. The process of
the study is killed, and in half of the cases its workers too; in the other half they outlive it, and end by themselves.

What is compared, byte for byte: ``compare.json``, ``compare.md`` and ``compare.html``. They hold all that the study
found. What the clock and the allocator say is never the same twice, so those files that keep it (``speed/``,
``times.jsonl``, ``environments.json``) are put in the place of the killed study's own at the end, and the reports are
made once more from what is kept: no job may be done then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
for place in (HERE.parents[1] / "tests", HERE.parents[1]):
    sys.path.insert(0, str(place))

import tiny  # noqa: E402
import yaml  # noqa: E402

REPORTS = ("compare.json", "compare.md", "compare.html")
MEASURED = ("speed", "times.jsonl", "environments.json")


def make(where: Path) -> Path:
    """Write the study's file, its recipe, model and rows; returns the file."""
    raw = json.loads(json.dumps(tiny.recipe(where, "lora", evaluation={"metrics": ["f1"], "max_new_tokens": 8}).raw))
    raw["data"] = {"train": str(tiny.write_chats(where / "all.jsonl", 60)), "max_length": 256}
    raw["training"] |= {"epochs": 2}
    del raw["optimizer"]
    (where / "recipe.yaml").write_text(yaml.safe_dump(raw))
    study = {"recipe": str(where / "recipe.yaml"), "methods": ["lora", "ia3"], "trials": 3, "seeds": 2}
    (where / "study.yaml").write_text(yaml.safe_dump({**study, "output_dir": str(where / "study")}))
    return where / "study.yaml"


def begin(study: Path) -> subprocess.Popen[bytes]:
    """Begin the study, or go on with it, in a process group of its own."""
    log = (study.parent / "log").open("ab")
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "ftune", "compare", str(study), "--yes"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=study.parent,
        )


def workers_of(process: int) -> list[int]:
    """The children of a process and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *workers_of(child)]
    return found


def kill(process: subprocess.Popen[bytes], workers: bool) -> None:
    children = workers_of(process.pid) if workers else []
    for number in (process.pid, *children):
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        study, root = make(where), where / "study"
        began = time.monotonic()
        if begin(study).wait():
            sys.exit((where / "log").read_text())
        whole = time.monotonic() - began
        alone = root.rename(where / "alone")
        # Early enough that so many kills can come, and anywhere: importing takes seconds of each session.
        killed = 0
        while killed < asked.kills:
            process = begin(study)
            try:
                process.wait(chance.uniform(1, max(8, 2 * whole / asked.kills)))
            except subprocess.TimeoutExpired:
                kill(process, workers=chance.random() < 0.5)
                killed += 1
                continue
            if process.returncode:
                sys.exit((where / "log").read_text())
            if killed < asked.kills:
                print(f"the study ended after {killed} kills: it is begun anew")
                shutil.rmtree(root)
        if begin(study).wait():
            sys.exit((where / "log").read_text())
        for name in MEASURED:
            shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
            copy = shutil.copytree if (alone / name).is_dir() else shutil.copy
            copy(alone / name, root / name)
        if begin(study).wait():
            sys.exit((where / "log").read_text())
        if (root / "times.jsonl").read_bytes() != (alone / "times.jsonl").read_bytes():
            sys.exit("a job was done although the study had ended")
        differ = [name for name in REPORTS if (root / name).read_bytes() != (alone / name).read_bytes()]
        found = f"DIFFERENT: {', '.join(differ)}" if differ else "all equal"
        print(f"{killed} kills, a study of {whole:.0f} s: {found}")
        if differ:
            kept = Path(tempfile.mkdtemp(prefix="study-"))
            for name, side in (("alone", alone), ("killed", root)):
                shutil.copytree(side, kept / name)
            sys.exit(f"both are in {kept}")


if __name__ == "__main__":
    main()
