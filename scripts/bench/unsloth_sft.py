"""Train with Unsloth: it has a Python interface only, so this script is its command. Runs in its environment."""

from __future__ import annotations

import sys

from sft_shared import make_trainer, read_settings, unsloth_model


def main(path: str) -> None:
    settings = read_settings(path)
    model, tokenizer = unsloth_model(settings)
    trainer = make_trainer(settings, model, tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1])
