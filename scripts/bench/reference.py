"""The loss of one batch by the plain path, in fp32: what every tool's first step is held against.

Run as a process of its own, so that the one which measures stays small::

    python scripts/bench/reference.py MODEL CHECK.messages.jsonl TRAIN.messages.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(model_directory: str, check: str, train: str) -> None:
    """Print, as JSON, the mean loss of ``check`` in each convention, and how many tokens both files have.

    A chat template may end the last turn with tokens behind its end-of-turn token (here a newline): ``with_rest``
    counts them, ``to_end_of_turn`` does not. ``token`` is the mean over all tokens of the batch, ``document`` the
    mean of the documents' means.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    losses: dict[str, list[torch.Tensor]] = {"with_rest": [], "to_end_of_turn": []}
    for prompt, whole, end in _documents(check, tokenizer):
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0]
        each = cross_entropy(logits[prompt - 1 : -1], torch.tensor(whole[prompt:]), reduction="none")
        losses["with_rest"].append(each)
        losses["to_end_of_turn"].append(each[: end - prompt])
    expected = {
        span: {
            "tokens": sum(len(each) for each in documents),
            "token": float(torch.cat(documents).mean()),
            "document": float(torch.stack([each.mean() for each in documents]).mean()),
        }
        for span, documents in losses.items()
    }
    documents = list(_documents(train, tokenizer))
    lengths = [len(whole) for _, whole, _ in documents]
    counts = {
        "examples": len(documents),
        "tokens": sum(lengths),
        "supervised": sum(end - prompt for prompt, _, end in documents),
        "shortest": min(lengths),
        "longest": max(lengths),
    }
    print(json.dumps({"check": expected, "train": counts}))


def _documents(path: str, tokenizer: Any) -> Iterator[tuple[int, list[int], int]]:
    """Of every conversation: the prompt's length, all tokens, and where the answer's end-of-turn token ends."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(messages)["input_ids"]
        assert whole[: len(prompt)] == prompt, "the prompt must be a prefix of the conversation"
        yield len(prompt), whole, len(whole) - whole[::-1].index(tokenizer.eos_token_id)


if __name__ == "__main__":
    main(*sys.argv[1:])
