"""ftune in the comparison: as it is, and with the micro-batches and recomputation that save memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job import ALPHA, LEARNING_RATE, RANK, SEED, Job, Phase, Tool, write_yaml


def _ftune(training: dict[str, Any]) -> Callable[[Job, Path], list[str]]:
    def configure(job: Job, bin_directory: Path) -> list[str]:
        recipe = {
            "version": 1,
            "model": {"id": str(job.model), "dtype": job.dtype},
            "method": {
                "name": "lora",
                "rank": RANK,
                "alpha": ALPHA,
                "dropout": 0.0,
                "target_modules": "all-linear",
            },
            "data": {
                "train": str(job.data / f"{job.split}.messages.jsonl"),
                "max_length": job.max_length,
                "packing": False,
                "train_on": "assistant",
            },
            "optimizer": {"learning_rate": LEARNING_RATE},
            "schedule": {"name": "constant", "warmup_ratio": 0.0},
            "training": {
                "max_steps": job.updates,
                "micro_batch_size": job.micro_batch,
                "gradient_accumulation_steps": job.accumulation,
                "gradient_checkpointing": False,
                "seed": SEED,
                **training,
            },
            "tracking": ["jsonl"],
            "output_dir": str(job.out / "run"),
        }
        return [str(bin_directory / "ftune"), "train", write_yaml(job, recipe)]

    return configure


def _read_ftune(job: Job, log: str) -> Phase:
    lines = (job.out / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
    return Phase(sum(step["seconds"] for step in steps), steps[0]["loss"])


def _variant(title: str, **training: Any) -> Tool:
    note = ", ".join(f"`{key}: {str(value).lower()}`" for key, value in training.items())
    return Tool(title, (), _ftune(training), _read_ftune, ("token", "to_end_of_turn"), note)


OURS = {
    "ftune": _variant("ftune"),
    "ftune-1024": _variant("ftune, 1024 tokens at once", micro_batch_tokens=1024),
    "ftune-768": _variant("ftune, 768 tokens at once", micro_batch_tokens=768),
    "ftune-512": _variant("ftune, 512 tokens at once", micro_batch_tokens=512),
    "ftune-lean": _variant("ftune, least memory", micro_batch_tokens=512, gradient_checkpointing=True),
}
