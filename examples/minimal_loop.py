"""Fine-tune a chat model with LoRA: the loop and the method in one file, to be read from top to bottom.

    python examples/minimal_loop.py MODEL_DIR train.jsonl OUT_DIR

It computes what ``ftune train`` computes (a test compares the losses) without what makes ftune useful: packing, other
dtypes, checkpoints, evaluation, merging, several processes, errors that help. Each line of the data is
``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}``.

Suffixes of tensors: B rows of a batch, L tokens, I and O features in and out, R rank, V vocabulary.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORE = -100  # the label of a token that is not in the loss


@dataclass(frozen=True)
class Settings:
    """What a recipe says: the defaults are those of ``recipes/lora.yaml``, without packing."""

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    epochs: int = 1
    rows_per_update: int = 8
    rows_per_micro_batch: int = 1
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    max_length: int = 512
    seed: int = 7


class LoRALinear(nn.Module):
    """``h = W x + (alpha / r) B A x`` with W frozen (arXiv:2106.09685). B starts at zero, so h starts as W x."""

    def __init__(self, base: nn.Linear, rank: int, alpha: int) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.A_RI = nn.Parameter(torch.empty(rank, base.in_features))
        self.B_OR = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A_RI, a=math.sqrt(5))

    def forward(self, x_BLI: Tensor) -> Tensor:
        """The frozen layer's output and the scaled update; (B, L, I) to (B, L, O)."""
        return self.base(x_BLI) + self.scale * (x_BLI @ self.A_RI.T @ self.B_OR.T)


def add_lora(model: nn.Module, settings: Settings) -> dict[str, LoRALinear]:
    """Freeze the model and put LoRA beside every linear layer but the output head; returns them by name."""
    torch.manual_seed(settings.seed)
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    adapted = {name: LoRALinear(linear, settings.rank, settings.alpha) for name, linear in linears.items()}
    for name, layer in adapted.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return adapted


def read_rows(path: Path, tokenizer: Any, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Each chat as token ids and labels. In the loss is what the model has to write: each answer and its end."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages, ids, labels, done = json.loads(line)["messages"], [], [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            text = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            assert prompt.startswith(done), "the template changes earlier turns"
            answer = text[len(prompt) : text.rindex(tokenizer.eos_token)] + tokenizer.eos_token
            # Tokenized apart: the answer begins with the token that generation would begin with.
            context, target = (
                tokenizer.encode(part, add_special_tokens=False) for part in (prompt[len(done) :], answer)
            )
            ids += context + target
            labels += [IGNORE] * len(context) + target
            done = prompt + answer
        rows.append((ids[:max_length], labels[:max_length]))
    return [(ids, labels) for ids, labels in rows if any(label != IGNORE for label in labels[1:])]


def updates(count: int, settings: Settings) -> Iterator[list[int]]:
    """The rows of each update: every epoch in another order, which depends on seed and epoch alone."""
    for epoch in range(settings.epochs):
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((settings.seed, epoch))))
        order = random.permutation(count)
        for start in range(0, count, settings.rows_per_update):
            yield order[start : start + settings.rows_per_update].tolist()


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to zero: a function of the step alone."""
    warmup = math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def summed_loss(model: nn.Module, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """The sum of the cross-entropies of all target tokens of some rows; the caller divides.

    Padding stands on the right with labels of -100. Attention is causal, so no target sees it and no mask is needed.
    """
    longest = max(len(ids) for ids, _ in rows)
    ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels_BL = torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in rows])
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    # The logits at position i predict the token at i + 1.
    return F.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def train(model: nn.Module, rows: list[tuple[list[int], list[int]]], settings: Settings) -> Iterator[float]:
    """Train, and yield the loss of every update: the mean over its target tokens."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)
    plan = list(updates(len(rows), settings))
    model.train()
    for step, chosen in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(plan), settings)
        batch = [rows[i] for i in chosen]
        # Divided by the targets of the whole update, not of a micro-batch: else short answers would weigh more.
        targets = sum(label != IGNORE for _, labels in batch for label in labels[1:])
        total = 0.0
        for start in range(0, len(batch), settings.rows_per_micro_batch):
            loss = summed_loss(model, batch[start : start + settings.rows_per_micro_batch]) / targets
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(trained, settings.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        yield total


def save(adapted: dict[str, LoRALinear], out: Path, settings: Settings) -> None:
    """Write the adapter in PEFT's format."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in adapted.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.A_RI.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.B_OR.detach()
    save_file(tensors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": settings.rank, "lora_alpha": settings.alpha}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in adapted})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))


def main(model_dir: str, data: str, out: str, settings: Settings = Settings()) -> None:
    """Train on a file of chats and save the adapter."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    rows = read_rows(Path(data), AutoTokenizer.from_pretrained(model_dir), settings.max_length)
    adapted = add_lora(model, settings)
    for step, loss in enumerate(train(model, rows, settings), start=1):
        print(f"step {step}  loss {loss:.4f}", flush=True)
    save(adapted, Path(out), settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
