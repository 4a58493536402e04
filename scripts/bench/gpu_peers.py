"""The other tools on a GPU: what is installed, their settings, and how what they print is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from gpu_cases import BATCH, Case, speed
from job import ALPHA, RANK, Job, Tool, write_yaml
from peers import PEERS, trainer_settings
from sft_peer import MARK

BITSANDBYTES = "bitsandbytes==0.50.2"


def with_4bit(tool: Tool) -> Tool:
    """The tool with what QLoRA needs."""
    return dataclasses.replace(tool, requirements=(*tool.requirements, BITSANDBYTES))


TOOLS = {name: with_4bit(PEERS[name]) for name in ("trl", "unsloth")}


def command(tool: str, case: Case, checkpointing: bool, job: Job, rows: Path, bin_directory: Path) -> list[str]:
    """Write the settings of a case; returns the command."""
    settings = {
        "tool": tool,
        "model": str(job.model),
        "data": str(rows),
        "cuda": job.cuda,
        "dtype": job.dtype,
        "four_bit": case.method == "qlora",
        "max_length": case.length,
        "rank": RANK,
        "alpha": ALPHA,
        "checkpointing": checkpointing,
        "trainer": trainer_settings(job),
    }
    return [str(bin_directory / "python"), str(Path(__file__).with_name("sft_peer.py")), write_yaml(job, settings)]


def read(log: str, case: Case, cuda: bool) -> dict[str, Any]:
    """What a finished run measured.

    Raises:
        LookupError: It says nothing, or it saw other rows than the case's.
    """
    said = [line.removeprefix(MARK) for line in log.splitlines() if line.startswith(MARK)]
    if not said:
        raise LookupError("the log has no line of measurements")
    found = json.loads(said[-1])
    tokens = BATCH * case.length
    if not found["seconds"] or not found["losses"]:
        raise LookupError("it made no update")
    if found["tokens"][0] not in (None, tokens):
        raise LookupError(f"it saw {found['tokens'][0]:.0f} tokens in the first update, not {tokens}")
    return (
        speed(found["seconds"], tokens)
        | {
            "first_loss": found["losses"][0],
            "attention": found["attention"],
            "trainable": found["trainable"],
        }
        | ({"peak_bytes": found["peak_bytes"]} if cuda else {})
    )
