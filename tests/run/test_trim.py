"""What the heap gives back between recomputed blocks."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch

from ftune.plan.recompute import blocks_of, enable_checkpointing
from ftune.run import memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_every_third_recomputed_block_gives_the_heap_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []

    class Library:
        @staticmethod
        def malloc_trim(pad: int) -> None:
            trimmed.append(pad)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library)
    model = tiny.model(num_hidden_layers=8)
    enable_checkpointing(model, 7)
    memory.trim_between_blocks(model)
    hooked = [index for index, block in enumerate(blocks_of(model)) if block._forward_pre_hooks]
    assert hooked == [0, 3, 6]
    model.train()(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert len(trimmed) >= 3
    assert set(trimmed) == {0}


def test_without_recomputation_nothing_is_given_back() -> None:
    model = tiny.model(num_hidden_layers=4)
    memory.trim_between_blocks(model)
    assert not any(block._forward_pre_hooks for block in blocks_of(model))
