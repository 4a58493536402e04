"""What the scripts that run in a peer's environment share; it imports only what TRL and Unsloth both bring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def read_settings(path: str) -> dict[str, Any]:
    """The settings as ``peers.py`` and ``gpu_peers.py`` write them."""
    settings: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return settings


def unsloth_model(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Unsloth's model with its adapter, and the tokenizer."""
    from unsloth import FastLanguageModel  # isort: skip  # must come first: it patches what follows
    import torch

    model, tokenizer = FastLanguageModel.from_pretrained(
        settings["model"],
        max_seq_length=settings["max_length"],
        dtype=getattr(torch, settings["dtype"]),
        load_in_4bit=settings["four_bit"],
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        # Its own form, which moves what a block keeps to the host.
        use_gradient_checkpointing="unsloth" if settings["checkpointing"] else False,
        random_state=settings["trainer"]["seed"],
    )
    return model, tokenizer


def make_trainer(
    settings: dict[str, Any], model: Any, tokenizer: Any, peft_config: Any = None, callbacks: Sequence[Any] = ()
) -> Any:
    """TRL's trainer on pairs of prompt and completion, loss on the completion."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        peft_config=peft_config,
        args=SFTConfig(
            max_length=settings["max_length"],
            completion_only_loss=True,
            gradient_checkpointing=settings["checkpointing"],
            use_cpu=not settings["cuda"],
            **settings["trainer"],
        ),
        callbacks=list(callbacks),
    )
