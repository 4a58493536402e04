"""What a tuned model has forgotten: it and its base on neutral text and on multiple-choice questions.

Both come with ftune (``neutral.json``, written for it, CC0), and neither is like a data set that people tune on:

- text: the cross-entropy of each token given those before it, tuned less base; and the KL divergence of the tuned
  model's next-token distribution from the base's, on as many positions as fit into memory;
- questions: of four continuations the one with the highest probability, all its tokens together.

Differences are paired, by text and by question, so that a small one shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ftune.run.head import autocast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["Probe", "forgotten", "probe"]

KL_BYTES = 128 * 2**20
"""What the base's distributions may take, in fp32; positions for KL are as many as fit, evenly spread."""


@dataclass(frozen=True)
class Probe:
    """What one model makes of the neutral text and of the questions.

    Attributes:
        losses: (texts,) mean cross-entropy of a text's tokens, in nats.
        tokens: (texts,) how many that are.
        log_probs: (positions, vocabulary) log-probabilities at some positions, fp32.
        right: (questions,) whether the right continuation is the likeliest; none where they were not asked.
    """

    losses: np.ndarray[Any, np.dtype[np.float64]]
    tokens: np.ndarray[Any, np.dtype[np.int64]]
    log_probs: Tensor
    right: np.ndarray[Any, np.dtype[np.bool_]]


@torch.no_grad()
def probe(model: nn.Module, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, *, questions: bool = True) -> Probe:
    """Read the texts and answer the questions.

    Args:
        model: A causal model, in evaluation mode; base and tuned model must have one vocabulary.
        tokenizer: Its tokenizer.
        dtype: What it computes in.
        questions: Whether to ask them: they take longest.
    """
    neutral = _neutral()
    texts = [_ids(tokenizer, text) for text in neutral["texts"]]
    losses, kept, start, stride = [], [], 0, 0
    for ids in texts:
        logits_TV = _logits(model, [ids], dtype)[0, :-1].float()
        log_probs_TV = logits_TV.log_softmax(-1)
        targets = torch.tensor(ids[1:], device=log_probs_TV.device)
        losses.append(float(F.nll_loss(log_probs_TV, targets)))
        if not stride:
            positions = sum(len(text) - 1 for text in texts)
            stride = max(1, math.ceil(positions * log_probs_TV.shape[1] * 4 / KL_BYTES))
        kept.append(log_probs_TV[start::stride].cpu())
        start = (start - len(ids) + 1) % stride
    asked = neutral["choices"] if questions else []
    right = [_is_right(model, tokenizer, question, dtype) for question in asked]
    tokens = np.array([len(ids) - 1 for ids in texts])
    return Probe(np.array(losses), tokens, torch.cat(kept), np.array(right, dtype=bool))


def forgotten(base: Probe, tuned: Probe) -> dict[str, Any]:
    """How much worse the tuned model is at what it was not trained on.

    Returns:
        ``base`` and ``tuned``, each with ``loss`` (nats a token of neutral text) and ``choices`` (share of questions
        answered right); ``loss`` and ``choices``: tuned less base, as ``[d, lo, hi]`` at 95 %, paired; ``kl``: mean
        KL(base || tuned) in nats a token; ``texts``, ``tokens`` and ``questions`` that were read. Without questions
        there is nothing of ``choices``.
    """
    found: dict[str, Any] = {}
    for who, one in (("base", base), ("tuned", tuned)):
        found[who] = {"loss": float(np.average(one.losses, weights=one.tokens))}
        if len(one.right):
            found[who]["choices"] = float(one.right.mean())
    kl = F.kl_div(tuned.log_probs, base.log_probs, log_target=True, reduction="none").sum(-1)
    changed = tuned.right.astype(float) - base.right
    if len(changed):
        # Two more questions, one won and one lost: few change, and then a normal interval is too short (Bonett and
        # Price 2012, J. Educ. Behav. Stat. 37:479).
        found["choices"] = [float(changed.mean()), *_interval(np.append(changed, [1.0, -1.0]))[1:]]
    return found | {
        "loss": _interval((tuned.losses - base.losses) * base.tokens / base.tokens.mean()),
        "kl": max(0.0, float(kl.mean())),
        "texts": len(base.losses),
        "tokens": int(base.tokens.sum()),
        "questions": len(base.right),
    }


def _interval(differences: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Mean and its 95 % interval, by the normal approximation."""
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))
    return [float(mean), float(mean - 1.96 * error), float(mean + 1.96 * error)]


def _is_right(model: nn.Module, tokenizer: PreTrainedTokenizerBase, question: Any, dtype: torch.dtype) -> bool:
    """Whether the right continuation of a question is the likeliest of its options."""
    before = _ids(tokenizer, question["question"])
    rows = [_ids(tokenizer, f"{question['question']} {option}") for option in question["options"]]
    # Tokens that merge across the border are counted with the option.
    first = min(
        next((i for i, pair in enumerate(zip(row, before, strict=False)) if pair[0] != pair[1]), len(before))
        for row in rows
    )
    log_probs_RTV = _logits(model, rows, dtype, last=max(map(len, rows)) - first + 1).float().log_softmax(-1)
    longest = max(map(len, rows))
    scores = []
    for row, log_probs_TV in zip(rows, log_probs_RTV, strict=True):
        # Position i predicts token i + 1; rows are padded behind.
        at = log_probs_TV[first - 1 - longest : len(row) - 1 - longest]
        scores.append(float(at.gather(1, torch.tensor(row[first:], device=at.device)[:, None]).sum()))
    return bool(np.argmax(scores) == question["answer"])


def _logits(model: nn.Module, rows: Sequence[Sequence[int]], dtype: torch.dtype, last: int = 0) -> Tensor:
    """Logits of rows, padded behind to one length, at their last positions (0: at all).

    What is padded is behind all that is looked at, so that causal attention needs no mask.
    """
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=device)
    with autocast(dtype, device.type):
        # Counted from the end: prompt tuning puts its own positions in front.
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=last or longest).logits
    return logits


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    ends = tokenizer.eos_token_id
    return ids[:-1] if len(ids) > 1 and ids[-1] == ends else ids  # some put an end behind every text


@cache
def _neutral() -> dict[str, Any]:
    file = resources.files("ftune.artifacts") / "neutral.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
