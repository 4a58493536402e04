"""Prompt tuning's own: where its embeddings start, recomputed blocks. See also test_virtual_tokens.py."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from ftune.plan.recompute import enable_checkpointing


def prompt_of(model: nn.Module) -> Tensor:
    [parameter] = [p for p in model.parameters() if p.requires_grad]
    return parameter


def test_it_starts_as_rows_of_the_embedding_that_depend_on_the_seed() -> None:
    method = tiny.method("prompt")
    rows = tiny.model().get_input_embeddings().weight
    starts = [prompt_of(method.adapt(tiny.model(), tiny.context(seed=seed))) for seed in (7, 7, 8)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    for start in starts:
        assert start.shape == (20, 64)
        assert (start[:, None] == rows).all(dim=-1).any(dim=1).all()


# the name that all transformers of version 5 know
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_recomputed_blocks_give_the_same_gradients() -> None:
    ids = tiny.batch()["input_ids"]
    gradients = []
    for recompute in (False, True):
        model = tiny.method("prompt").adapt(tiny.model().requires_grad_(False), tiny.context()).train()
        if recompute:
            enable_checkpointing(model)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(prompt_of(model).grad)
    assert gradients[0].abs().min() > 0
    assert torch.equal(gradients[0], gradients[1])
