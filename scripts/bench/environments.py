"""An environment of its own for every peer, under ``build/bench/<peer>/env``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from job import Tool

TORCH = "torch==2.13.0"
SHOWN = (
    "ftune",
    "torch",
    "transformers",
    "peft",
    "trl",
    "llamafactory",
    "litgpt",
    "lightning",
    "unsloth",
    "axolotl",
    "bitsandbytes",
    "flash_attn",
)


def build(tool: Tool, directory: Path, cuda: bool) -> Path:
    """Install a tool unless this very list is installed already.

    torch goes first, by a line of its own, and holds from then on: asked for by a dependency, pip would bring
    another build of it.

    Returns:
        The environment's ``bin``; for ftune's variants, that of this interpreter.
    """
    if not tool.requirements:
        return Path(sys.executable).parent
    environment, stamp = directory / "env", directory / "installed.txt"
    bin_directory = environment / "bin"
    wanted = "\n".join([TORCH, *tool.requirements, f"cuda={cuda}"])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return bin_directory
    python = sys.executable if tool.python is None else shutil.which(tool.python)
    if python is None:
        raise SystemExit(f"{tool.title} needs {tool.python} on the PATH")
    shutil.rmtree(environment, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    constraint = directory / "constraint.txt"
    constraint.write_text(TORCH + "\n", encoding="utf-8")
    pip = [str(bin_directory / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(constraint)]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, *tool.requirements], check=True)
    if tool.mend and not cuda:
        tool.mend(bin_directory)
    stamp.write_text(wanted, encoding="utf-8")
    return bin_directory


_ASK = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def versions(bin_directory: Path) -> dict[str, str]:
    """The versions of the packages that matter in an environment, as its interpreter finds them."""
    command = [str(bin_directory / "python"), "-c", _ASK, *SHOWN]
    found: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


ISAS = {"avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}
"""Variables with which torch, oneDNN and MKL use no newer instructions, as on a CPU that has none."""


def variables(directory: Path, threads: int, cuda: bool, isa: str | None = None) -> dict[str, str]:
    """Environment variables that every tool is given: threads, caches, no network, and no holes in a GPU's memory.

    Args:
        directory: Where caches go.
        threads: Of every tool.
        cuda: On a GPU; else it is hidden.
        isa: The newest instructions to use, of ``ISAS``; None: all that the CPU has.
    """
    cache = str(directory / "cache")
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": cache,
        "XDG_CACHE_HOME": cache,
        **(ISAS[isa] if isa else {}),
    } | ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if cuda else {"CUDA_VISIBLE_DEVICES": ""})
