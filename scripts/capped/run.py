"""Run the tests that compute as on an older processor: with newer instructions left unused, and memory unaligned.

torch, oneDNN and MKL choose their kernels by the instructions that a processor has, and each rounds its own way: what
holds on one may fail on another. On Linux with a C compiler, tensors are also placed at multiples of 16 bytes
(unaligned.c), by which MKL's results differ, too.

    python scripts/capped/run.py                     # every level below this CPU's own
    python scripts/capped/run.py --levels avx2 -- -x tests/methods

What follows ``--`` goes to pytest instead of the directories of the level.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Level:
    """Instructions that are left, and what to run with them.

    Attributes:
        needs: A flag of ``/proc/cpuinfo`` that a processor of this level has.
        newer: One that only newer ones have: without it there is nothing to leave unused.
        variables: Of the environment, which torch, oneDNN and MKL read.
        paths: Tests.
        plugin: One of pytest that chooses among them.
    """

    needs: str
    newer: str
    variables: Mapping[str, str]
    paths: tuple[str, ...]
    plugin: str | None = None


LEVELS = {
    "avx2": Level(
        "avx2",
        "avx512f",
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
        ("tests/ops", "tests/methods", "tests/contract", "tests/run", "tests/artifacts", "tests/plan/test_lean.py"),
    ),
    # fp32 is computed as on this CPU, though from unaligned memory, which is tried once.
    "avx512": Level("avx512f", "avx512_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ("tests/ops", "tests/methods")),
    "avx512-bf16": Level(
        "avx512_bf16",
        "amx_bf16",
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        ("tests/ops", "tests/methods"),
        plugin="scripts.capped.bfloat16",
    ),
}
"""From the oldest on. A CPU with AVX2 only runs its own level in ``make test``, so it has none to add."""


def flags() -> set[str]:
    """Instructions of this processor; none where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def possible(has: set[str]) -> list[str]:
    """Levels that a processor can be held to."""
    return [name for name, level in LEVELS.items() if {level.needs, level.newer} <= has]


def unaligned(directory: Path) -> Mapping[str, str]:
    """The variable that places tensors at other addresses; none without Linux or a C compiler."""
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        print("no C compiler: memory stays aligned", flush=True)
        return {}
    library = directory / "unaligned.so"
    source = Path(__file__).with_name("unaligned.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {"LD_PRELOAD": str(library)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), help="default: every one below this CPU's own")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("pytest", nargs="*", help="instead of the level's directories")
    options = parser.parse_args()
    levels = options.levels or possible(flags())
    if not levels:
        print("this CPU has no instructions to leave unused")
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        memory = unaligned(Path(scratch))
        for name in levels:
            level = LEVELS[name]
            print(f"as with {name}:", " ".join(f"{key}={value}" for key, value in level.variables.items()), flush=True)
            command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-n", str(options.jobs)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | level.variables | memory
            if level.plugin:
                command += ["-p", level.plugin]
            done = subprocess.run([*command, *(options.pytest or level.paths)], cwd=ROOT, env=environment)
            if done.returncode:
                failed.append(name)
    if failed:
        sys.exit(f"failed as with {', '.join(failed)}")


if __name__ == "__main__":
    main()
