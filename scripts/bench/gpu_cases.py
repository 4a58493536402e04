"""What is measured on a GPU: the cases, ftune's recipe of each, its rows, and what its run says of itself."""

from __future__ import annotations

import json
import random
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import ALPHA, LEARNING_RATE, RANK, SEED

BATCH = 2  # rows in an update, one in a forward pass: gradients lie in memory during the second
DOCUMENTS = 4  # in a packed row
SHORT = 2048  # tokens: rows that a GPU is done with about as fast as Python can launch its kernels
PAPER = "qlora-paper"
PAPER_LENGTH = 512
TITLES = {"s2": "lora over S2-Attn", PAPER: "qlora, the paper's setting"}
METHODS = ("lora", "qlora", "dora", "galore", "longlora", "s2", PAPER)
PEER_METHODS = ("lora", "qlora")
# As torch, bitsandbytes, cuBLAS and ftune say it; not any line that gives advice on memory.
OUT_OF_MEMORY = r"^error: memory ran out|OutOfMemoryError|CUDA\b.{0,20}out of memory|CUBLAS_STATUS_ALLOC_FAILED"


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        method: Of ``METHODS``.
        length: Tokens in a row.
        documents: In a row.
        attention: As in a recipe.
        recompute: Every block, whatever the memory; else ``auto``.
    """

    method: str
    length: int
    documents: int = 1
    attention: str = "sdpa"
    recompute: bool = False

    @property
    def key(self) -> str:
        """A name for files."""
        return f"{self.method}-{self.length}x{self.documents}-{self.attention}{'-recompute' * self.recompute}"

    def updates(self, least: int) -> int:
        """How many updates are made: of short rows eight times as many, since what a process does in Python counts."""
        return least if self.length > SHORT else 8 * least

    @property
    def has_peers(self) -> bool:
        """Whether other tools train it too: rows of one document, which need neither padding nor packing."""
        return self in [Case(method, self.length) for method in PEER_METHODS]


def cases(methods: list[str], lengths: list[int], flash: bool) -> Iterator[Case]:
    """Every case, the short ones first.

    LoRA trains packed rows as well, where attention is computed document by document, and with
    ``flash_attention_2`` where that is installed. The paper's setting of QLoRA has a length of its own. Attention in
    shifted groups is compared with every block recomputed: left to itself (``auto``), each run would recompute as
    many as fill the memory, and neither time nor memory would say anything of attention.
    """
    if PAPER in methods:
        yield Case(PAPER, PAPER_LENGTH, recompute=True)
    for length in sorted(lengths):
        yield from (Case(method, length) for method in methods if method not in ("s2", PAPER))
        if "lora" in methods:
            yield Case("lora", length, DOCUMENTS)
            if flash:
                yield Case("lora", length, 1, "flash_attention_2")
                yield Case("lora", length, DOCUMENTS, "flash_attention_2")
        if "s2" in methods:
            compared = ["lora", "s2", *(["longlora"] if "longlora" in methods else [])]
            yield from (Case(method, length, recompute=True) for method in compared)


def method_block(method: str, hidden: int, dtype: str) -> dict[str, Any]:
    """The ``method`` of a recipe."""
    lora = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "target_modules": "all-linear"}
    if method == "galore":
        # A quarter of the width is the paper's rank at 7B. Weights in bf16: fp32 ones and their gradients are 60 GiB.
        # The subspaces of 224 matrices by `eigh` take minutes, which is the first update's time and no other's.
        rank = min(1024, hidden // 4)
        return {"name": "galore", "rank": rank, "weights": dtype, "basis": "randomized"}
    if method == "longlora":
        return {"name": "longlora"}
    if method == "s2":
        # LoRA's own settings, so that attention is all that differs.
        return {"name": "longlora", "train_embeddings": False, "train_norms": False} | lora
    if method == PAPER:
        return {"name": "qlora", "rank": 64}
    return {"name": method} | lora


def recipe(
    case: Case,
    model: Path,
    rows: Path,
    updates: int,
    hidden: int,
    out: Path,
    recompute: bool = False,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """The recipe of a case.

    Args:
        case: What to train.
        model: Directory of the weights.
        rows: File of the examples.
        updates: How many.
        hidden: The model's width.
        out: The run's directory.
        recompute: Every block, where ``auto`` was too hopeful.
        dtype: What to compute in: that in which the device is fast.
    """
    optimizer = {"galore": "adamw_8bit", PAPER: "paged_adamw"}.get(case.method, "adamw")
    return {
        "version": 1,
        "model": {"id": str(model), "dtype": dtype, "attention": case.attention},
        "method": method_block(case.method, hidden, dtype),
        "data": {"train": str(rows), "max_length": case.length, "train_on": "assistant"},
        "optimizer": {"name": optimizer, "learning_rate": LEARNING_RATE},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
        "training": {
            "max_steps": updates,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": BATCH,
            "gradient_checkpointing": True if recompute or case.recompute else "auto",
            "seed": SEED,
        },
        "checkpoint": {"keep": 1},
        "tracking": ["jsonl"],
        "output_dir": str(out),
    }


def write_rows(path: Path, words: list[str], case: Case, updates: int) -> None:
    """Documents that are one text, so that the first loss does not depend on the order in which a tool takes them.

    A row of ``case.length`` tokens holds ``case.documents``; the second half of each is in the loss. Every word is
    a token, and each tool adds the token of the end.
    """
    tokens = case.length // case.documents
    if tokens * case.documents != case.length:
        raise SystemExit(f"rows of {case.length} tokens cannot hold {case.documents} documents of one length")
    answer = tokens // 2
    drawn = random.Random(SEED).choices(words, k=tokens - 1)
    prompt, completion = drawn[: tokens - answer], drawn[tokens - answer :]
    row = {"prompt": " ".join(prompt), "completion": "".join(f" {word}" for word in completion)}
    path.write_text(f"{json.dumps(row)}\n" * (updates * BATCH * case.documents), encoding="utf-8")


def steady(seconds: list[float]) -> list[float]:
    """The updates that count, the second half: the first ones compile, fill caches, find subspaces, record graphs."""
    return seconds[len(seconds) // 2 :]


def speed(seconds: list[float], tokens: int) -> dict[str, Any]:
    """What the times of updates of so many tokens say."""
    counted = steady(seconds)
    return {
        "tokens_per_second": tokens * len(counted) / sum(counted),
        "step_seconds": statistics.median(counted),
        "first_step_seconds": seconds[0],
        "tokens": tokens,
    }


def read_run(run: Path, case: Case) -> dict[str, Any]:
    """What a finished run of ftune measured.

    Raises:
        LookupError: The run made no update, or its rows have another length than the case's.
    """
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
    if not steps:
        raise LookupError("no update in metrics.jsonl")
    if record["plan"]["data"]["fill"] != 1.0:
        raise LookupError(f"rows of other lengths than {case.length}: {record['plan']['data']}")
    return (
        planned(run)
        | speed([step["seconds"] for step in steps], steps[0]["tokens"])
        | {
            "supervised": steps[0]["target_tokens"],
            "first_loss": steps[0]["loss"],
            "peak_bytes": record["measured"]["peak_bytes"],
            "attention": record["lean"]["attention"],
            "kernels": record["lean"].get("kernels", ""),
            "graphs": record["lean"].get("graphs"),
            "loss": record["lean"].get("loss", ""),
            "optimizer": record["optimizer"],
            "vitals": record["vitals_line"],
        }
    )


def planned(run: Path) -> dict[str, Any]:
    """What was predicted, for a run that failed too; nothing where it failed before its plan was written."""
    try:
        plan = json.loads((run / "run.json").read_text(encoding="utf-8"))["plan"]
    except OSError:
        return {}
    training = plan["training"]
    return {
        "predicted": plan["memory"],
        "recomputed_blocks": training["recomputed_blocks"],
        "blocks": training["blocks"],
        "trainable": plan["method"]["trainable"],
    }


def failure(log: str, end: str) -> tuple[str, str]:
    """``out of memory`` or ``failed``, and the line of a log that says why; ``end`` where none does."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    ran_out = [line for line in lines if re.search(OUT_OF_MEMORY, line, re.IGNORECASE)]
    if ran_out:
        return "out of memory", ran_out[-1]
    said = [line for line in lines if re.match(r"(error|\w*(Error|Exception|Exit)):", line)]
    return "failed", (said or [end])[-1]
