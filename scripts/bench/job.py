"""A training run as every tool is given it, and what is known of a tool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RANK, ALPHA, LEARNING_RATE, SEED = 16, 32, 2.0e-4, 7


@dataclass(frozen=True)
class Job:
    """One training run, the same for every tool.

    Attributes:
        model: Directory of safetensors with a tokenizer.
        data: Directory that ``work.write_data`` wrote.
        split: ``train``, or ``check`` (one batch).
        updates: Optimizer updates.
        batch: Examples in an update.
        micro_batch: Examples in a forward pass, where a tool has no better way to split an update.
        max_length: Longest example, in tokens.
        cuda: On a GPU; else on the CPU.
        dtype: ``float32`` or ``bfloat16``, in which every tool computes.
        out: Directory for its configuration and output; empty.
    """

    model: Path
    data: Path
    split: str
    updates: int
    batch: int
    micro_batch: int
    max_length: int
    cuda: bool
    out: Path
    dtype: str = "bfloat16"

    @property
    def bfloat16(self) -> bool:
        """Whether to compute in bfloat16, as most tools ask."""
        return self.dtype == "bfloat16"

    @property
    def accumulation(self) -> int:
        """Forward passes in an update."""
        return self.batch // self.micro_batch


@dataclass(frozen=True)
class Phase:
    """What a tool's own log says: seconds of training, start-up and saving left out, and the loss of step 1."""

    seconds: float
    first_loss: float


@dataclass(frozen=True)
class Tool:
    """A tool, or a variant of ftune.

    Attributes:
        title: As the tables name it.
        requirements: For pip, pinned; none: the environment this runs in.
        configure: Writes a job's configuration, given the environment's ``bin``; returns the command.
        read: Reads the log and output of a finished job.
        loss: Which value of ``reference.py`` its first loss should be.
        note: What its figures or settings need to be understood.
        cuda_only: It does not train on a CPU; the note says why.
        python: The interpreter that its environment needs, where that is not this one.
        check_updates: Updates to make where only the first is of interest.
        mend: Makes a fresh environment work on a machine without a GPU, given its ``bin``.
    """

    title: str
    requirements: tuple[str, ...]
    configure: Callable[[Job, Path], list[str]]
    read: Callable[[Job, str], Phase]
    loss: tuple[str, str]
    note: str = ""
    cuda_only: bool = False
    python: str | None = None
    check_updates: int = 1
    mend: Callable[[Path], None] | None = None


def write_yaml(job: Job, settings: dict[str, Any]) -> str:
    """Write a job's configuration; returns its path."""
    path = job.out / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return str(path)
