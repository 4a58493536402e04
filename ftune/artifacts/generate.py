"""Greedy answers to held-out prompts, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch

from ftune.artifacts.one_pass import settings_of
from ftune.artifacts.stops import end_token_ids
from ftune.data.answers import Answer, read_answer
from ftune.data.chat import special_tokens
from ftune.run.objective import autocast

if TYPE_CHECKING:
    from torch import nn

__all__ = ["decoded", "greedy"]


@torch.no_grad()
def greedy(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    batch_size: int,
    max_new_tokens: int,
    stops: Sequence[int] = (),
    equal_lengths: bool = False,
) -> list[Answer]:
    """Answer each prompt greedily.

    Args:
        model: A causal model in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids, generation prompt included.
        dtype: What the model computes in.
        batch_size: Prompts generated together; those of similar length share a batch.
        max_new_tokens: Longest answer.
        stops: Tokens that end an answer, beside those of the model and the tokenizer.
        equal_lengths: Let only prompts of one length share a batch, so that none is padded.

    Returns:
        The answers in the order of the prompts.
    """
    device = next(model.parameters()).device
    ends = end_token_ids(model, tokenizer, stops)
    answers = [Answer("", "")] * len(prompts)
    for chosen in _batches([len(prompt) for prompt in prompts], batch_size, equal_lengths=equal_lengths):
        longest = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            # On the left, so that every prompt ends where its answer begins.
            ids[row, longest - len(prompts[index]) :] = torch.tensor(list(prompts[index]))
            mask[row, longest - len(prompts[index]) :] = 1
        with autocast(dtype, device.type):
            output = cast(Any, model).generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                **settings_of(tokenizer, ends),
            )
        written = [output[row, longest:].tolist() for row in range(len(chosen))]
        for index, answer in zip(chosen, decoded(written, tokenizer, ends), strict=True):
            answers[index] = answer
    return answers


def decoded(written: Sequence[Sequence[int]], tokenizer: Any, ends: Sequence[int]) -> list[Answer]:
    """Answers from their tokens, up to the first that ends one."""
    specials, stops = tuple(special_tokens(tokenizer)), frozenset(ends)
    found: list[Answer] = []
    for tokens in written:
        end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
        found.append(read_answer(tokenizer.decode(list(tokens[:end]), skip_special_tokens=False), specials))
    return found


def _batches(lengths: Sequence[int], batch_size: int, *, equal_lengths: bool) -> Iterator[list[int]]:
    """Indices of the prompts that are answered together, the shortest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    runs = [list(run) for _, run in groupby(order, key=lengths.__getitem__)] if equal_lengths else [order]
    for run in runs:
        for start in range(0, len(run), batch_size):
            yield run[start : start + batch_size]
