"""The shapes of micro-batches that a plan foresees, and the kernels that are kept for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoConfig, MistralConfig, MistralForCausalLM

from ftune.data import batches
from ftune.memory.kernels import KEPT, KERNEL_BYTES, OF_HEAD, UPDATES, Batching, Shapes, kernel_bytes, shapes_of
from ftune.methods import METHODS
from ftune.plan.resolve import resolve
from ftune.plan.shapes import read_shape
from ftune.run import micro_batches

SHAPES = Path(__file__).parents[2] / "ftune" / "shapes"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def batching(**changes: Any) -> Batching:
    settings: dict[str, Any] = {
        "steps": 2,
        "global_batch": 4,
        "micro_batch_size": 2,
        "micro_batch_tokens": 100,
        "flat": True,
        "by_length": False,
        "seed": 0,
        "world": 1,
    }
    return Batching(**settings | changes)


@pytest.mark.parametrize(
    ("method", "training", "packing"),
    [
        ("lora", {"micro_batch_size": 1, "gradient_accumulation_steps": 3}, False),
        ("lora", {"micro_batch_size": 3, "micro_batch_tokens": 90, "epochs": 3}, False),
        ("lora", {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}, True),
        # Attention of its own, which takes no documents.
        ("longlora", {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2}, False),
        # Rows that cannot be laid behind each other, in an order by length.
        ("prompt", {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2}, False),
    ],
)
def test_every_shape_of_a_run_is_foreseen(
    method: str, training: dict[str, Any], packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftune.artifacts.training import train

    loaded = tiny.recipe(tmp_path, method, training=training, data={"packing": packing, "eval": None})
    seen, targets = set(), []

    def watching(*arguments: Any, **named: Any) -> batches.Batch:
        batch = batches.collate(*arguments, **named)
        seen.add(tuple(batch.input_ids.shape))
        targets.append(batch.target_tokens)
        return batch

    monkeypatch.setattr(micro_batches, "collate", watching)
    train(loaded)
    foreseen = resolve(loaded.recipe).memory.request
    assert foreseen.row_shapes == len(seen) > (0 if packing else 1)
    assert foreseen.target_tokens == max(targets)
    if method == "lora":
        assert (foreseen.rows, foreseen.length) == (1, max(rows * length for rows, length in seen))
    else:
        assert foreseen.rows == 2
        assert foreseen.length >= max(length for _, length in seen)


def test_rows_longer_than_a_window_are_not_laid_behind_each_other(tmp_path: Path) -> None:
    rows = {"micro_batch_size": 2, "max_steps": 100}
    wide, narrow = (
        resolve(tiny.recipe(tmp_path / str(window), model={"id": mistral(tmp_path, window)}, training=rows).recipe)
        for window in (256, 16)
    )
    assert wide.memory.request.longest == wide.memory.request.length // 2
    assert narrow.memory.request.longest is None
    assert narrow.memory.request.rows == 2


def mistral(where: Path, window: int) -> str:
    base = MistralForCausalLM(MistralConfig(**SIZES, vocab_size=259, sliding_window=window, head_dim=8))
    base.save_pretrained(where / f"mistral-{window}")
    tiny.tokenizer().save_pretrained(where / f"mistral-{window}")
    return str(where / f"mistral-{window}")


def test_a_long_run_is_judged_by_some_of_its_rows() -> None:
    lengths = [20 + 7 * (i % 11) for i in range(5000)]
    few = shapes_of(lengths, lengths, batching(steps=5000))
    assert (few.most_tokens, few.most_targets) == (None, None)
    # widths of 8 to 104 tokens in steps of 8
    assert 8 <= few.different <= 12
    steps = UPDATES * 2
    assert shapes_of(lengths[: steps * 4], lengths, batching(steps=steps, flat=False)).most_tokens is None


def test_of_several_processes_the_largest_micro_batch_is_not_known() -> None:
    shapes = shapes_of([10] * 8, [5] * 8, batching(steps=2, world=2))
    assert shapes == Shapes(1, None, None)
    assert shapes_of([10] * 8, [5] * 8, batching(steps=2)) == Shapes(1, 40, 20)


COUNTED = {"full": 12, "galore": 12, "fourierft": 10, "vera": 14, "bottleneck": 16} | dict.fromkeys(
    ("lora", "qlora", "dora", "adalora"), 32
)
"""Misses of oneDNN's cache that a new length of rows brought in SmolLM2-135M, by its own log; of others eight."""


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"longlora"}))
def test_as_many_kernels_as_were_counted(name: str) -> None:
    shape = read_shape(AutoConfig.from_pretrained(SHAPES / "smollm2-135m"))
    expected = COUNTED.get(name, 8) + OF_HEAD
    assert kernel_bytes(METHODS[name](), shape, 3) == 3 * expected * KERNEL_BYTES
    assert kernel_bytes(METHODS[name](), shape, 1000) == KEPT * KERNEL_BYTES
