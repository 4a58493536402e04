"""Train with Unsloth: it has a Python interface only, so this script is its command. Runs in its environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml


def main(path: str) -> None:
    from unsloth import FastLanguageModel  # isort: skip  # must come first: it patches what follows
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    model, tokenizer = FastLanguageModel.from_pretrained(
        settings["model"], max_seq_length=settings["max_length"], load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False,
        random_state=settings["trainer"]["seed"],
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        args=SFTConfig(
            max_length=settings["max_length"],
            completion_only_loss=True,
            gradient_checkpointing=False,
            **settings["trainer"],
        ),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1])
