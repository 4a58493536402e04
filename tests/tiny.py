"""Tiny random models, a byte-level tokenizer and small recipes, made on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ftune.memory.request import Request
from ftune.methods import METHODS, Context, Method, ModelShape
from ftune.recipe.load import Loaded, parse_recipe
from ftune.run.events import Event

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "qlora": {"rank": 4},
    "dora": {"rank": 4},
    "vera": {"rank": 64, "d_initial": 1.0},
    "fourierft": {"n_frequency": 100, "scaling": 2000},
    "longlora": {"rank": 4, "group_size": 32},
    "adalora": {"init_rank": 6, "target_rank": 4, "alpha": 240},
    "bottleneck": {"bottleneck_size": 8},
    "galore": {"rank": 8, "update_every": 2},
}
"""Settings under which a method suits a tiny model; a method that is not here runs on its defaults."""

LEARNING_RATES = {"full": 1e-3, "prefix": 1e-1, "ia3": 1e-1, "vera": 3e-2}
"""Rates at which a few steps show; 1e-2 for a method that is not here."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHATML
    return fast


def config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**settings | changes)


def model(**changes: Any) -> torch.nn.Module:
    """A tiny random Llama in fp32, the same at every call, with weights large enough to matter."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(**changes), dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return made


def model_dir(path: Path, **changes: Any) -> Path:
    """Save the tiny model and its tokenizer as a local directory."""
    model(**changes).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def context(**changes: Any) -> Context:
    settings: dict[str, Any] = {
        "total_steps": 10,
        "seed": 7,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "base_name": "tiny/llama",
    }
    return Context(**settings | changes)


def method(name: str, **settings: Any) -> Method:
    return METHODS[name](**SETTINGS.get(name, {}) | settings)


def batch(rows: int = 2, length: int = 12, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, len(tokenizer()), (rows, length), generator=generator)
    return {"input_ids": ids}


def logits(of: torch.nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Logits at the positions of the inputs, on the CPU: prompt tuning puts its own in front."""
    of.eval()
    device = of.get_input_embeddings().weight.device
    inputs = {name: tensor.to(device) for name, tensor in (inputs or batch()).items()}
    with torch.no_grad():
        return of(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :].cpu()


def disturb(adapted: torch.nn.Module, scale: float = 0.1) -> None:
    """Give every trained parameter a random push, so that the method has an effect without training."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * scale * parameter.std().clamp_min(0.05))


CHATS = [("What color is the sky?", "Blue."), ("Two plus two?", "It is four."), ("Say hi.", "Hi there!")]


def write_chats(path: Path, count: int, start: int = 0) -> Path:
    """Write ``count`` short chats of different lengths."""
    lines = []
    for index in range(start, start + count):
        question, answer = CHATS[index % len(CHATS)]
        turns = [
            {"role": "user", "content": f"{question} ({'x' * (index * 7 % 23)}{index})"},
            {"role": "assistant", "content": f"{answer} {index % 5}"},
        ]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe(where: Path, method: str = "lora", /, **blocks: Any) -> Loaded:
    """A recipe on the tiny model and short chats, all under ``where``; blocks are merged over it."""
    if not (where / "base").exists():
        model_dir(where / "base")
        write_chats(where / "train.jsonl", 24)
        write_chats(where / "eval.jsonl", 6, start=100)
    data: dict[str, Any] = {
        "model": {"id": str(where / "base"), "dtype": "float32"},
        "method": {"name": method, **SETTINGS.get(method, {})},
        "data": {"train": str(where / "train.jsonl"), "eval": str(where / "eval.jsonl"), "max_length": 256},
        "optimizer": {"learning_rate": LEARNING_RATES.get(method, 1e-2)},
        "training": {"max_steps": 4, "micro_batch_size": 1, "gradient_accumulation_steps": 2},
        "tracking": ["jsonl"],
        "output_dir": str(where / "run"),
    }
    for name, block in blocks.items():
        data[name] = {**data[name], **block} if isinstance(block, dict) and isinstance(data.get(name), dict) else block
    return parse_recipe(json.dumps(data), str(where / "recipe.yaml"))


def recipe_to_compare(where: Path) -> Path:
    """Write a recipe for a study, which draws its rows and tries its own rates."""
    raw = dict(recipe(where, "lora", evaluation={"metrics": ["f1"], "max_new_tokens": 8}).raw)
    raw["data"] = {"train": str(write_chats(where / "all.jsonl", 40)), "max_length": 256}
    del raw["optimizer"]
    path = where / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(raw))))
    return path


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's ``metrics.jsonl``."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def request(method: Method, shape: ModelShape, **changes: Any) -> Request:
    """What the memory estimate is asked, with nothing recomputed on CUDA in bf16 where a test says no more."""
    settings: dict[str, Any] = {
        "optimizer": "adamw",
        "dtype_bytes": 2,
        "rows": 1,
        "length": 1024,
        "target_tokens": 1,
        "recomputed_blocks": 0,
        "attention": "sdpa",
        "device_type": "cuda",
        "packed": False,
    }
    return Request(method, shape, **settings | changes)


class Heard:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def receive(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True
